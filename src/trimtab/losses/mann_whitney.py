"""Mann-Whitney loss: every right pair above every wrong pair of the whole batch, so that one threshold fits all.

Reach for it where scores are cut at one global threshold: retrieval that filters passages by score, or any classifier
whose scores of different rows are compared. `InfoNCE` orders the passages of each query and no more: a term that
depends on the query alone passes it by, and spoils the threshold.

Paper: Sheikholeslami, Hosseini, Bechard, Daruru, Rajeswar 2025, arXiv 2510.00137; there is no official code. Its Eq. 3
leaves out the temperature, which its lemma and its experiments have, and sums over negatives but averages over
positives; ``reduction="paper"`` is that. The default is the mean over pairs, which bounds the probability of a wrong
order: 1 - AUC <= loss / log 2 at every temperature. The two differ by the number of negatives, which Adam hardly
notices, and SGD and clipping do. Multiple positives a query and dropped pairs (the same passage twice in a batch) are
ours.

A batch of b queries with h hard negatives has b^2 (b h + b - 1) pairs of pairs. They are formed in blocks that stay in
the cache, forward and backward, so memory grows with the b^2 (1 + h) scores alone, at about half the time of the naive
form from b = 64 on.

What we found: InfoNCE's gradient on a term of the query alone is zero but for rounding, and Adam divides rounding by
its own size: in single precision such a term drifted by 0.2 in 600 steps, in double by 3e-9 (the claim's setting).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from trimtab.core import checks
from trimtab.core.checks import InputError
from trimtab.losses.base import full_precision, same_device, widened
from trimtab.losses.retrieval import Positive, as_mask, judged

PairReduction = Literal["pairs", "paper", "none"]

_CACHED, _LARGE = 1 << 17, 1 << 24  # pairs in a block, on a CPU and elsewhere
_LINEAR = 40.0  # beyond it softplus(x) is x in double precision


class MannWhitney(nn.Module):
    """Mean over pairs of log(1 + exp((negative - positive) / temperature)), from any positive to any negative.

    Args:
        temperature: of the score differences, > 0; 0.01 for cosines, as in the paper.
        reduction: ``"pairs"``: mean over all pairs of a positive and a negative; ``"paper"``: sum over negatives, mean
            over positives, as Eq. 3; ``"none"``: each positive's mean over the negatives.

    Raises:
        InputError: the temperature or the reduction is not one of these.

    Example:
        >>> from trimtab.losses import dual_encoder_scores
        >>> generator = torch.Generator().manual_seed(0)
        >>> queries, noise = torch.randn(2, 8, 16, generator=generator)
        >>> scores = dual_encoder_scores(queries, queries + noise)
        >>> round(float(MannWhitney(temperature=0.1)(scores)), 4)
        0.0027

    Reference:
        Sheikholeslami et al. 2025, https://arxiv.org/abs/2510.00137
    """

    def __init__(self, *, temperature: float = 0.01, reduction: PairReduction = "pairs"):
        super().__init__()
        self.temperature = checks.number(temperature, "temperature", low=0.0, low_open=True)
        self.reduction = checks.one_of(reduction, "reduction", PairReduction)

    def forward(
        self,
        similarity: Float[Tensor, "q d"],
        positive: Positive = None,
        *,
        dropped: Bool[Tensor, "q d"] | None = None,
    ) -> Tensor:
        """The loss of a matrix of scores; logits (n, c) with labels (n,) are such a matrix.

        `torch.compile` captures it whole where `positive` is no mask and nothing is dropped.

        Args:
            similarity: (q, d) scores of rows (queries) with columns (passages), as from `dual_encoder_scores`.
            positive: the column of each row's positive pair (q,), or all positive pairs (q, d), any number in a row.
                By default the diagonal.
            dropped: (q, d) pairs that shall not count as negative, such as a passage that is in the batch twice; a
                positive one stays positive.

        Returns:
            A scalar; a number for each positive with ``reduction="none"``, row by row.

        Raises:
            InputError: an argument is malformed or not finite, or there is no positive or no negative pair.
        """
        s, positive, dropped = judged(similarity, positive, dropped)
        if positive.ndim == 1 and dropped is None:
            others = torch.arange(s.shape[1] - 1, device=s.device)
            others = others + (others >= positive[:, None])
            return self._loss(s.gather(1, positive[:, None])[:, 0], s.gather(1, others).flatten())
        right = as_mask(positive, s.shape[1])
        return self._loss(s[right], s[~(right if dropped is None else right | dropped)])

    def from_scores(self, positives: Float[Tensor, " p"], negatives: Float[Tensor, " m"]) -> Tensor:
        """The loss of scores that are not in a matrix: all positive against all negative ones.

        Args:
            positives: (p,) scores, p >= 1.
            negatives: (m,) scores, m >= 1.

        Raises:
            InputError: an argument is empty, malformed or not finite.

        Example:
            >>> round(float(MannWhitney(temperature=1).from_scores(torch.tensor([1.0]), torch.tensor([0.0, 1.0]))), 4)
            0.5032
        """
        same_device(positives=positives, negatives=negatives)
        for name, scores in (("positives", positives), ("negatives", negatives)):
            if scores.ndim != 1 or not scores.is_floating_point() or not len(scores):
                raise InputError(f"{name} must be floating point of shape (n,), n >= 1, got {checks.described(scores)}")
            checks.finite(scores, name)
        return self._loss(widened(positives), widened(negatives))

    def _loss(self, positives: Float[Tensor, " p"], negatives: Float[Tensor, " m"]) -> Tensor:
        sums = _logistic_sums(positives / self.temperature, negatives / self.temperature)
        if self.reduction == "paper":
            return sums.mean()
        means = sums / len(negatives)
        return means.mean() if self.reduction == "pairs" else means


def _logistic_sums(positives: Float[Tensor, " p"], negatives: Float[Tensor, " m"]) -> Float[Tensor, " p"]:
    """For each positive the sum over negatives of log(1 + exp(negative - positive))."""
    block = _CACHED if positives.device.type == "cpu" else _LARGE
    parts: list[Tensor] = [
        _LogisticSums.apply(positives, part, max(1, block // len(part)))  # type: ignore[no-untyped-call]
        for part in negatives.split(block)
    ]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


class _LogisticSums(torch.autograd.Function):
    """The sums of all negatives, some rows (positives) of the matrix of pairs at a time, in either direction."""

    @staticmethod
    def forward(ctx: Any, positives: Tensor, negatives: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(positives, negatives)
        ctx.rows = rows
        blocks = positives[:, None].split(rows)
        return torch.cat([F.softplus(negatives - p, threshold=_LINEAR).sum(1) for p in blocks])

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor, None]:
        positives, negatives = ctx.saved_tensors
        to_positives, to_negatives = [], torch.zeros_like(negatives)
        with full_precision(slope):
            for p, g in zip(positives[:, None].split(ctx.rows), slope.split(ctx.rows)):
                share = (negatives - p).sigmoid()
                to_positives.append(share.sum(1))
                to_negatives = to_negatives + g @ share
        return -slope * torch.cat(to_positives), to_negatives, None
