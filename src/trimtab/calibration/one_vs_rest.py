"""Calibrating class by class: the score of one class against the rest, and one distribution from c binary answers.

With two classes there is one binary problem, that of class 1; with more there are c of them, and the c answers are
divided by their sum (Zadrozny and Elkan 2002).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import softplus

from trimtab.calibration.base import logsumexp
from trimtab.calibration.solve import newton

_BLOCK_ELEMENTS = 1 << 16


def log_odds(logits: Float[Tensor, "n c"]) -> Float[Tensor, "n k"]:
    """log p_k / (1 - p_k) of the binary problems, p = softmax(logits): (n, c), or (n, 1) with two classes.

    Exact in both tails: probabilities that round to one still differ here.
    """
    if logits.shape[1] == 2:
        return logits[:, 1:] - logits[:, :1]
    top, index = logits.max(1, keepdim=True)
    is_top = torch.arange(logits.shape[1], device=logits.device) == index
    z = logits - top
    e = z.exp()
    rest = (e.sum(1, keepdim=True) - e).masked_fill(is_top, 1).log()
    second = logsumexp(z.masked_fill(is_top, -torch.inf), 1)
    return z - torch.where(is_top, second, rest)


def log_sigmoid(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """log sigmoid(x), by softplus: ONNX has no logsigmoid, and the log of its sigmoid is wrong in the tails."""
    return -softplus(-x, threshold=40.0)


def from_log_odds(odds: Float[Tensor, "n k"]) -> Float[Tensor, "n c"]:
    """Log-probabilities of all classes from the binary problems' log-odds."""
    if odds.shape[1] == 1:
        return torch.cat([log_sigmoid(-odds), log_sigmoid(odds)], 1)
    return log_sigmoid(odds).log_softmax(1)


def from_probabilities(q: Float[Tensor, "n k"]) -> Float[Tensor, "n c"]:
    """Log-probabilities of all classes from the binary problems' probabilities; uniform where all of them are zero."""
    if q.shape[1] == 1:
        return torch.cat([1 - q, q], 1).log()
    total = q.sum(1, keepdim=True)
    return torch.where(total > 0, q / total.where(total > 0, torch.ones_like(total)), 1 / q.shape[1]).log()


def outcomes(labels: Int[Tensor, " n"], c: int) -> Float[Tensor, "n k"]:
    """The binary problems' outcomes, 0 or 1, in float64."""
    if c == 2:
        return labels[:, None].double()
    return torch.nn.functional.one_hot(labels, c).double()


def ascending(scores: Float[Tensor, " n"]) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"], Bool[Tensor, " n-1"]]:
    """The scores in order, the order, and where one differs from the next.

    Scores a few roundings apart are one: the same row of logits need not give the same bits at every place of a batch.
    """
    # NumPy sorts by vector instructions, five times as fast as torch
    order = torch.from_numpy(np.argsort(scores.numpy())) if scores.device.type == "cpu" else scores.argsort()
    x = scores[order]
    return x, order, x.diff() > 16 * torch.finfo(x.dtype).eps * x[1:].abs().clamp(min=1)


def fit_logistic(
    features: Sequence[Float[Tensor, "n k"]],
    outcomes: Float[Tensor, "n k"],
    weights: Float[Tensor, " n"] | None,
    *,
    lower: Sequence[float] | None = None,
    prior: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Float[Tensor, "k d"]:
    """k logistic regressions side by side: coefficients of the features and an intercept, by maximum likelihood.

    Args:
        features: d - 1 tensors (n, k): each binary problem has its own scores.
        outcomes: what the probabilities should be, in 0..1.
        weights: sample weights.
        lower: lower bounds of the d coefficients; none by default.
        prior: means and standard deviations of a Gaussian prior on the d coefficients; none by default.
    """
    k, d = outcomes.shape[1], len(features) + 1
    w = torch.ones_like(outcomes[:, 0]) if weights is None else weights.double()
    total = w.sum()
    mean, sd = torch.tensor(prior or ([0.0] * d, [torch.inf] * d), dtype=torch.float64, device=w.device)
    precision = 1 / (total * sd.square())
    rows = max(1, _BLOCK_ELEMENTS // k)

    def objective(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        off = x - mean
        loss, gradient = (precision * off.square()).sum(1) / 2, precision * off
        hessian = torch.diag(precision).repeat(k, 1, 1)
        for start in range(0, len(w), rows):
            block = slice(start, start + rows)
            f = [feature[block].double() for feature in features]
            t = outcomes[block]
            share = w[block, None] / total
            odds = x[:, -1] + sum(f_a * x[:, a] for a, f_a in enumerate(f))
            p = odds.sigmoid()
            loss += (share * (softplus(odds) - t * odds)).sum(0)
            residual = share * (p - t)
            curvature = share * p * (1 - p)
            f.append(torch.ones_like(p))
            for a in range(d):
                gradient[:, a] += (residual * f[a]).sum(0)
                bent = curvature * f[a]
                for b in range(a + 1):
                    hessian[:, a, b] += (bent * f[b]).sum(0)
        return loss, gradient, hessian.tril() + hessian.tril(-1).mT

    rate = (w @ outcomes / total).clamp(1 / (2 * total + 1), 2 * total / (2 * total + 1))
    start = torch.zeros(k, d, dtype=torch.float64, device=w.device)
    start[:, -1] = rate.logit()
    return newton(objective, start, lower=None if lower is None else torch.tensor(lower))
