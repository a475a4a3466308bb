"""Direct Coverage Optimization (DCO): fine-tune a generator that will be sampled N times, with a verifier behind it.

Cross-entropy goes on making a model surer of what it knows already, and the problems that it does not know pay for it:
pass@N falls while pass@1 rises. The chance that one of N samples is right, 1 - (1 - p)^N, asks for no more confidence
than N samples need. Its gradient is that of cross-entropy times F(N, p) = N p (1 - p)^(N - 1) / (1 - (1 - p)^N), which
is 1 at p = 0 and falls to nothing once p is a few times 1/N. Reach for it where N is known before training; with N = 1
it is cross-entropy.

Chen, Raventós, Cheng, Ganguli, Druckmann (NeurIPS 2025), arXiv 2502.07154. As in the authors' code
(allanraventos/refine), the value is F times the negative log-likelihood with F held constant: its gradient is that of
the coverage, the number itself is not; `coverage_loss` is the loss of the paper, value and gradient. Where N p < 0.1,
F is the code's quotient of two series, up to 1.4e-4 (relative) off the closed form at that edge. The default of the
code's command line divides each answer's loss by its number of tokens, which is no longer the paper's gradient:
`length_normalize` does that. Their code gives an answer without tokens a loss of zero; here it is refused.

What we found: in the claim's long training on noisy labels, cross-entropy's pass@8 falls from 0.87 (epoch 10) to 0.76
(epoch 60); that of DCO ends at 0.82. Yet cross-entropy stopped at epoch 10 has more of both, pass@1 and pass@8, than
DCO at epoch 60: stop early where something can be held out. And p is a product: for N = 256 and answers of 100 tokens,
F stays above 0.9 until tokens have a probability of 0.93 each. On long answers the loss is cross-entropy until they are
known by heart, so the paper scores proofs step by step, and estimates the chance of a chain of thought by sampling.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from trimtab.core import checks
from trimtab.core.checks import InputError
from trimtab.core.precision import doubled
from trimtab.losses.base import Reduction, reduced, same_device, widened

_MOST = 2**53  # the last whole number up to which float64 holds all


class DirectCoverage(nn.Module):
    """F(N, p) times the negative log-likelihood of every answer, with F held constant.

    Its gradient is that of -log(1 - (1 - p)^N); its value is not that number. What a row is decides the form:

    - answer by answer: a row is a whole answer, p the product over its tokens;
    - step by step (proofs): a row is one step, p that step's alone, and `samples` acts as the branching factor: a proof
      of k steps is found in about samples^k attempts;
    - answers in steps: a row is one step, and `answers` says which answer it belongs to; all steps of an answer share
      the F of their product;
    - chains of thought: `chances` gives p, estimated as the share of sampled chains that end in the right answer.

    Args:
        samples: N, how many answers will be drawn, 1 to 2^53; the authors use 1 (cross-entropy) to 4096.
        length_normalize: divide each row's loss by its number of tokens, as the authors' command line does. False: the
            gradient of the paper.
        shift: whether the token at position t is predicted by the logits at t - 1, as causal language models' logits
            do; only for sequences.
        ignore_index: label of positions that do not count: prompt and padding.
        reduction: over rows.

    Raises:
        InputError: an argument is out of its range.

    Example:
        >>> import torch
        >>> from trimtab.losses import DirectCoverage
        >>> labels = torch.tensor([[-100, 1, 2], [-100, 0, -100]])  # a prompt of one token; answers of two and of one
        >>> logits = torch.zeros(2, 3, 4)
        >>> logits[1, 0, 0] = 4.0  # the second answer is known by heart: it is left in peace
        >>> DirectCoverage(samples=16, reduction="none")(logits, labels).round(decimals=4)
        tensor([1.6354, 0.0000])

    Reference:
        Chen et al., Rethinking Fine-Tuning when Scaling Test-Time Compute: Limiting Confidence Improves Mathematical
        Reasoning, NeurIPS 2025, arXiv 2502.07154.
    """

    def __init__(
        self,
        *,
        samples: int,
        length_normalize: bool = False,
        shift: bool = True,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        self.samples = checks.integer(samples, "samples", low=1, high=_MOST)
        self.length_normalize = length_normalize
        self.shift = shift
        self.ignore_index = checks.integer(ignore_index, "ignore_index")
        self.reduction = checks.one_of(reduction, "reduction", Reduction)

    def forward(
        self,
        logits: Float[Tensor, "n s v"] | Float[Tensor, "n v"],
        labels: Int[Tensor, "n s"] | Int[Tensor, " n"],
        *,
        answers: Int[Tensor, " n"] | None = None,
        chances: Float[Tensor, " n"] | None = None,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            logits: (n, s, v), scores of v tokens at s positions; or (n, v), where an answer is one of v classes.
            labels: (n, s) or (n,), integers in 0..v-1, or `ignore_index`; at least one that counts in every row.
            answers: (n,), integers in 0..n-1: rows with the same number are the steps of one answer. None: every row is
                an answer, or a step scored by itself.
            chances: (n,), in 0..1: p itself, where it was estimated by sampling. None: the model's own.

        Returns:
            A scalar, or (n,) without reduction; at least float32.

        Raises:
            InputError: a shape, a type, a device or a value is wrong, a row has no label that counts, the logits give
                a label no finite log-probability, or both `answers` and `chances` are given.
        """
        nll, tokens = _likelihood(logits, labels, self.ignore_index, self.shift)
        if answers is not None and chances is not None:
            raise InputError("answers and chances must not be given together: chances are already those of the answers")
        if chances is not None:
            p = _vector(chances, len(nll), logits)
        else:
            log_p = -doubled(nll.detach())
            if answers is not None:
                same_device(logits=logits, answers=answers)
                index = checks.labels(answers, len(nll), len(nll), "answers")
                log_p = torch.zeros_like(log_p).index_add(0, index, log_p)[index]
            p = log_p.exp()
        factor = _factor(p, self.samples).to(nll.dtype)
        return reduced(factor * (nll / tokens if self.length_normalize else nll), self.reduction)


def answer_log_prob(
    logits: Float[Tensor, "n s v"] | Float[Tensor, "n v"],
    labels: Int[Tensor, "n s"] | Int[Tensor, " n"],
    *,
    shift: bool = True,
    ignore_index: int = -100,
) -> Float[Tensor, " n"]:
    """log p of every answer: the sum of its tokens' log-probabilities, differentiable.

    Arguments and refusals are those of `DirectCoverage`.

    Example:
        >>> import torch
        >>> from trimtab.losses import answer_log_prob
        >>> answer_log_prob(torch.zeros(1, 3, 4), torch.tensor([[-100, 1, 2]])).exp()
        tensor([0.0625])
    """
    return -_likelihood(logits, labels, ignore_index, shift).nll


def coverage_loss(log_p: Float[Tensor, " n"], samples: int) -> Float[Tensor, " n"]:
    """The loss of the paper, -log(1 - (1 - p)^N): value and gradient, for every log p.

    Args:
        log_p: (n,), log-probabilities of answers, such as `answer_log_prob` gives, <= 0 and finite.
        samples: N, 1 to 2^53.

    Returns:
        (n,), at least float32; differentiable once.

    Raises:
        InputError: an argument is out of its range.

    Example:
        >>> import torch
        >>> from trimtab.losses import coverage_loss
        >>> coverage_loss(torch.tensor([-2000.0, -2.0, -0.1]), 4)
        tensor([1.9986e+03, 8.1865e-01, 8.2013e-05])

    Reference:
        Chen et al., NeurIPS 2025, arXiv 2502.07154.
    """
    log_p = widened(_floating(log_p, "log_p"))
    checks.within(checks.finite(log_p, "log_p"), "log_p", -math.inf, 0)
    samples = checks.integer(samples, "samples", low=1, high=_MOST)
    exact = doubled(log_p.detach())
    p = exact.exp()
    likely = -torch.log(-torch.expm1(samples * torch.log1p(-p)))
    value = torch.where(exact < _UNLIKELY[exact.dtype], -math.log(samples) - exact, likely)
    # the chain rule through p = 1 is infinity times zero: the gradient is written down
    return value.to(log_p.dtype) - _factor(p, samples).to(log_p.dtype) * (log_p - log_p.detach())


def coverage_factor(p: Float[Tensor, " n"], samples: int) -> Float[Tensor, " n"]:
    """F(N, p): how much of cross-entropy's gradient is left of an answer that has probability p.

    Args:
        p: (n,), in 0..1.
        samples: N, 1 to 2^53.

    Returns:
        (n,), in 0..1, computed and returned in float64 (float32 on Apple's GPUs): 1 at p = 0, 0 at p = 1 (where N > 1),
        falling between.

    Raises:
        InputError: an argument is out of its range.

    Example:
        >>> import torch
        >>> from trimtab.losses import coverage_factor
        >>> coverage_factor(torch.tensor([0.0, 0.01, 0.1, 1.0]), 16).round(decimals=3).tolist()
        [1.0, 0.926, 0.404, 0.0]

    Reference:
        Chen et al., NeurIPS 2025, arXiv 2502.07154.
    """
    p = checks.within(_floating(p, "p"), "p", 0, 1)
    return _factor(doubled(p.detach()), checks.integer(samples, "samples", low=1, high=_MOST))


_UNLIKELY = {torch.float64: -600.0, torch.float32: -80.0}  # where probabilities are about to underflow


def _factor(p: Tensor, samples: int) -> Tensor:
    """F of probabilities; by the authors' series where N p < 0.1."""
    if samples == 1:
        return torch.ones_like(p)
    first = (samples - 1) * p
    second = first * (samples - 2) * p
    series = (1 - first + second / 2) / (1 - first / 2 + second / 6)
    missed = (1 - p) ** (samples - 1)
    closed = samples * p * missed / (1 - missed * (1 - p))
    return torch.where(samples * p < 0.1, series, closed)


class _Likelihood(NamedTuple):
    """The negative log-likelihood of every row, and how many tokens it sums over."""

    nll: Tensor
    tokens: Tensor


def _likelihood(logits: Tensor, labels: Tensor, ignored: int, shift: bool) -> _Likelihood:
    same_device(logits=logits, labels=labels)
    _floating(logits, "logits", axes=(2, 3))
    if labels.shape != logits.shape[:-1]:
        raise InputError(f"labels must have shape {tuple(logits.shape[:-1])}, got {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise InputError(f"labels must be integers, got {str(labels.dtype).removeprefix('torch.')}")
    if logits.ndim == 2:
        logits, labels = logits[:, None], labels[:, None]
    elif shift:
        labels = pad(labels[:, 1:], (0, 1), value=ignored)
    n, s, v = logits.shape
    labels, counted = labels.long(), labels != ignored
    tokens = counted.sum(1)
    if not checks.unread(labels):
        low, high = torch.aminmax(labels.where(counted, 0))
        if low.item() < 0 or high.item() >= v:
            row, column = (int(i) for i in (counted & ((labels < 0) | (labels >= v))).nonzero()[0])
            raise InputError(
                f"labels must lie in 0..{v - 1} or be {ignored}, found {int(labels[row, column])} at row {row}"
            )
        if int(tokens.min()) == 0:
            where = checks.first_bad(tokens == 0)
            raise InputError(f"labels must have one that counts in every row, found none at {where}")
    flat = cross_entropy(widened(logits).flatten(0, 1), labels.flatten(), ignore_index=ignored, reduction="none")
    nll = flat.view(n, s)
    # one number a token tells what a pass over all logits would
    checks.finite(nll, "the log-probability that logits give to labels")
    return _Likelihood(nll.sum(1), tokens.clamp(min=1))


def _floating(x: Tensor, name: str, axes: tuple[int, ...] = (1,)) -> Tensor:
    if not checks.tensor(x, name).is_floating_point():
        raise InputError(f"{name} must be floating point, got {str(x.dtype).removeprefix('torch.')}")
    if x.ndim not in axes or x.shape[0] == 0:
        words = " or ".join(str(axis) for axis in axes)
        raise InputError(f"{name} must have {words} axes and at least one row, got shape {tuple(x.shape)}")
    return x


def _vector(chances: Tensor, n: int, logits: Tensor) -> Tensor:
    same_device(logits=logits, chances=chances)
    if _floating(chances, "chances").shape != (n,):
        raise InputError(f"chances must have shape ({n},), got {tuple(chances.shape)}")
    return checks.within(doubled(chances.detach()), "chances", 0, 1)
