"""The last steps of SDM: a rescaled output, the region in which it can be trusted, and how far rounds disagree."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trimtab.core.progress import track

BINS = 20
_EPS = float(torch.finfo(torch.float32).eps)
_PATIENCE = 10


def rescaled(weight: Tensor, quantiles: Float[Tensor, "n c"], similarity: Float[Tensor, " n"]) -> Float[Tensor, "n c"]:
    """log o: the activation of the rescaled quantiles to the base 2 + similarity, as natural logarithms."""
    return ((quantiles @ weight.mT) * (2 + similarity[:, None]).log()).log_softmax(1)


def train_rescalers(
    quantiles: Float[np.ndarray, "rounds n c"],
    similarity: Float[np.ndarray, "rounds n"],
    labels: Int[np.ndarray, "rounds n"],
    *,
    epochs: int,
    lr: float,
    random: np.random.Generator,
) -> Float[np.ndarray, "rounds c c"]:
    """Adam, one point at a time, on the log loss to the base 2 + similarity; all rounds side by side.

    A round stops after more than ten epochs in a row above its minimum, and keeps the weights at the end of the epoch
    with the smallest loss on the way through it. The gradient is written out: one step of all rounds takes less
    time than one of a single round would through automatic differentiation.
    """
    rounds, n, c = quantiles.shape
    w = random.uniform(-1, 1, (rounds, c, c)) / math.sqrt(c)
    first, second = np.zeros_like(w), np.zeros_like(w)
    best, lowest, waited = w.copy(), np.full(rounds, np.inf), np.zeros(rounds, dtype=int)
    running, each, step = np.ones(rounds, dtype=bool), np.arange(rounds), 0
    bases = np.log(2 + similarity)
    for _ in track(range(epochs), "SDM: rescaler"):
        order = np.stack([random.permutation(n) for _ in range(rounds)], 1)
        total = np.zeros(rounds)
        for rows in order:
            v, base, y = quantiles[each, rows], bases[each, rows], labels[each, rows]
            step += 1
            logits = (w @ v[:, :, None])[:, :, 0]
            top = logits.argmax(1)
            powers = np.exp(base[:, None] * (logits - logits[each, top][:, None]))
            at_label, mass = powers[each, y], powers.sum(1) + _EPS
            total += (np.log(mass) - np.log(at_label + _EPS)) / base
            slope = powers / mass[:, None]
            slope[each, y] -= at_label / (at_label + _EPS)
            slope[each, top] -= slope.sum(1)
            gradient = slope[:, :, None] * v[:, None, :]
            first += 0.1 * (gradient - first)
            second += 0.001 * (gradient * gradient - second)
            w -= (lr / (1 - 0.9**step)) * first / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        loss = total / n
        better = running & (loss < lowest)
        best[better], lowest[better] = w[better], loss[better]
        waited = np.where(loss > lowest, waited + 1, 0)
        running &= waited <= _PATIENCE
        if not running.any():
            break
    return best


class Region(NamedTuple):
    """Where the rescaled output reaches the asked accuracy in every class.

    Attributes:
        thresholds: psi (c,), the least output that counts as support for a class; zeros where nothing is admitted.
        similarity: the least rescaled similarity, infinite where nothing is admitted.
        outside: (n,) calibration points that are out of distribution.
        magnitudes: (c, BINS), the median output of the predicted class over calibration points predicted so, by whole
            rescaled similarity; NaN where there are none. Points out of distribution count in bin 0.
    """

    thresholds: Tensor
    similarity: float
    outside: Bool[Tensor, " n"]
    magnitudes: Tensor


def region(log_output: Tensor, similarity: Tensor, predicted: Tensor, labels: Tensor, alpha: float) -> Region:
    """The smallest similarity from which all classes' (1 - alpha) quantiles of the true class's output reach alpha."""
    c = log_output.shape[1]
    bins = similarity.floor()
    outside = (bins <= 0) | (log_output.argmax(1) != predicted)
    inside = ~outside
    candidates = similarity[inside].unique()
    output = log_output.exp()
    at_label = output.gather(1, labels[:, None])[:, 0]
    good = torch.ones_like(candidates, dtype=torch.bool)
    for k in range(c):
        rows = inside & (labels == k)
        reached = similarity[rows].sort().values
        short = similarity[rows & (at_label < alpha)].sort().values
        many = len(reached) - torch.searchsorted(reached, candidates)
        few = len(short) - torch.searchsorted(short, candidates)
        # the quantile is the (i + 1)st smallest: it reaches alpha where no more than i lie below
        good &= (many > 0) & (few <= _place(many, alpha))
    thresholds, least = output.new_zeros(c), math.inf
    if bool(good.any()):
        least = float(candidates[good][0])
        for k in range(c):
            values = at_label[inside & (labels == k) & (similarity >= least)].sort().values
            thresholds[k] = values[_place(torch.tensor(len(values)), alpha)]
    magnitudes = output.new_full((c, BINS), torch.nan)
    cell = torch.where(outside, 0, bins.clamp(0, BINS - 1)).long()
    at_predicted = output.gather(1, predicted[:, None])[:, 0]
    for k, b in torch.stack([predicted, cell], 1).unique(dim=0).tolist():
        magnitudes[k, b] = float(np.median(at_predicted[(predicted == k) & (cell == b)].cpu().numpy()))
    return Region(thresholds, least, outside, magnitudes)


def _place(n: Tensor, alpha: float) -> Tensor:
    return ((1 - alpha) * n.double()).long().minimum(n - 1)


def bounds(similarities: list[float], best: float, magnitudes: Tensor, alpha: float) -> tuple[float, Tensor]:
    """What the spread over rounds adds: a stricter least similarity, and what to subtract from an output (c, BINS).

    Spread is the median absolute deviation, scaled by the Cauchy distribution's alpha quantile. Where it is not finite,
    nothing is added.

    Args:
        similarities: the least similarity of every round.
        best: that of the round that is kept.
        magnitudes: (rounds, c, BINS), NaN where a round has none.
        alpha: the asked accuracy.
    """
    factor = math.tan(math.pi * (alpha - 0.5))
    with np.errstate(invalid="ignore"):
        bounded = best + factor * _spread(np.array(similarities))
    values = magnitudes.cpu().numpy()
    offsets = np.zeros(values.shape[1:])
    for k, b in zip(*np.nonzero(~np.isnan(values).all(0))):
        offsets[k, b] = factor * _spread(values[~np.isnan(values[:, k, b]), k, b])
    return bounded if math.isfinite(bounded) else best, torch.from_numpy(offsets).to(magnitudes)


def _spread(values: Float[np.ndarray, " n"]) -> float:
    return float(np.median(np.abs(values - np.median(values))))
