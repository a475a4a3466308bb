"""What the maps that are linear before the softmax share: a centre to shrink to, and one pass over the log loss."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.calibration.solve import lbfgs, newton
from trimtab.core import checks
from trimtab.core.temperature import BOUNDS, fit_temperature

_BLOCK_ELEMENTS = 1 << 17
_NEWTON_CLASSES = 200


def temperature_factor(
    logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"], weights: Float[Tensor, " n"] | None
) -> float:
    """1 / T of temperature scaling, on which the priors of more flexible maps are centred. T at a bound serves too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return 1 / fit_temperature(logits, labels, weights)


def start(centre: Float[Tensor, "*shape"], factor: float) -> Float[Tensor, "*shape"]:
    """Where a search begins: the prior's centre, or zero if T is at its upper bound, where the logits mislead."""
    return centre if factor * BOUNDS[1] > 1 + 1e-9 else torch.zeros_like(centre)


def prior_sd(value: float | None, name: str) -> float | None:
    """The standard deviation of a prior, > 0; None is no prior at all."""
    return None if value is None else checks.number(value, name, low=0, low_open=True)


def total_weight(labels: Int[Tensor, " n"], weights: Float[Tensor, " n"] | None) -> float:
    """The number of samples, or what their weights add up to."""
    return float(len(labels) if weights is None else weights.sum(dtype=torch.float64))


def blocks(
    scores: Float[Tensor, "n c"],
    labels: Int[Tensor, " n"],
    weights: Float[Tensor, " n"] | None,
    dtype: torch.dtype = torch.float64,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Consecutive rows: scores (r, c), labels (r,), and shares (r,) of the mean, which add up to one in all."""
    n, c = scores.shape
    rows = max(1, _BLOCK_ELEMENTS // c)
    w = torch.ones(n, dtype=torch.float64, device=scores.device) if weights is None else weights.double()
    w = (w / w.sum()).to(dtype)
    for start in range(0, n, rows):
        block = slice(start, start + rows)
        yield scores[block].to(dtype), labels[block], w[block]


def log_loss(
    logits: Float[Tensor, "r c"], labels: Int[Tensor, " r"], shares: Float[Tensor, " r"]
) -> tuple[Tensor, Float[Tensor, "r c"], Float[Tensor, "r c"]]:
    """A block's part of the mean log loss, its gradient in the logits, and the probabilities."""
    log_probs = logits.log_softmax(1)
    at_label = labels[:, None]
    p = log_probs.exp()
    gradient = (p * shares[:, None]).scatter_add_(1, at_label, -shares[:, None])
    return -(log_probs.gather(1, at_label)[:, 0].double() @ shares.double()), gradient, p


def slopes_and_shifts(
    logits: Float[Tensor, "n c"],
    labels: Int[Tensor, " n"],
    weights: Float[Tensor, " n"] | None,
    precision: Float[Tensor, " d"],
    centre: Float[Tensor, " d"],
    start: Float[Tensor, " d"],
) -> Float[Tensor, " d"]:
    """Slopes and shifts, d = 2 c, of softmax(slope * logits + shift) that minimise the penalised mean log loss.

    The penalty is half of `precision` times the square of the distance from `centre`.
    """
    c = logits.shape[1]

    def first_order(x: Tensor) -> tuple[Tensor, Tensor]:
        loss, gradient = (precision * (x - centre).square()).sum() / 2, precision * (x - centre)
        for z, y, shares in blocks(logits, labels, weights):
            part, residual, _ = log_loss(z * x[:c] + x[c:], y, shares)
            loss += part
            gradient += torch.cat([(residual * z).sum(0), residual.sum(0)])
        return loss, gradient

    def second_order(batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = batch[0]
        loss, gradient = (precision * (x - centre).square()).sum() / 2, precision * (x - centre)
        hessian = torch.diag(precision)
        same_class = hessian.view(2, c, 2, c).diagonal(dim1=1, dim2=3)
        for z, y, shares in blocks(logits, labels, weights):
            part, residual, p = log_loss(z * x[:c] + x[c:], y, shares)
            loss += part
            gradient += torch.cat([(residual * z).sum(0), residual.sum(0)])
            mass = p * shares[:, None]
            moments = [(mass * z * z).sum(0), (mass * z).sum(0), mass.sum(0)]
            same_class += torch.stack([torch.stack(moments[:2]), torch.stack(moments[1:])])
            hessian -= torch.cat([z * p, p], 1).mT @ torch.cat([z * mass, mass], 1)
        return loss[None], gradient[None], hessian[None]

    if c <= _NEWTON_CLASSES:
        return newton(second_order, start[None])[0]
    rate = torch.bincount(labels, weights, minlength=c).double() / total_weight(labels, weights)
    size = logits.double().square().mean(0)
    curvature = torch.cat([rate * (1 - rate) * size, rate * (1 - rate)]) + precision
    return lbfgs(first_order, start, curvature)
