"""What the ranking measures share: cumulative counts at the ends of tied groups, for any number of resamples.

Samples that tie cannot be told apart by a threshold, so every curve here moves from one distinct value to the next.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from trimtab.metrics.binning import prefix, tie_ends


def cumulative(
    chosen: Bool[Tensor, " n"], weights: Num[Tensor, "r n"] | None, ends: Int[Tensor, " groups"]
) -> Float[Tensor, "r m"]:
    """How many chosen samples lie at or below each distinct value, beginning with 0: m = groups + 1."""
    sums = prefix(chosen[None] if weights is None else weights * chosen)
    return torch.cat([sums[:, :1], sums[:, ends]], 1)


def area(positive: Float[Tensor, "r m"], negative: Float[Tensor, "r m"]) -> Float[Tensor, " r"]:
    """Area under the ROC curve: the share of (positive, negative) pairs in the right order, ties counting half.

    Takes cumulative counts by ascending score. NaN where one of the two kinds is missing.
    """
    below = (negative[:, 1:] + negative[:, :-1]) / 2
    return torch.linalg.vecdot(positive.diff(), below) / (positive[:, -1] * negative[:, -1])


def area_under_risk(mass: Float[Tensor, "r m"], wrong: Float[Tensor, "r m"]) -> Float[Tensor, " r"]:
    """Mean over k = 1..n of the share of errors among the k most confident samples.

    Takes cumulative counts by ascending confidence. Inside a tied group the errors are spread evenly, which is their
    expectation over all orders. With a = samples and E = errors above a group of m samples and e errors, its sum over
    k = a+1..a+m of (E + e (k - a) / m) / k is (E - e a / m)(H(a + m) - H(a)) + e, H being the harmonic numbers.
    """
    n = mass[:1, -1]
    above, errors_above = n - mass[:, 1:], wrong[:, -1:] - wrong[:, 1:]
    samples, errors = mass.diff(), wrong.diff()
    harmonic = prefix(1 / torch.arange(1, int(n) + 1, dtype=torch.float64, device=mass.device)[None])[0]
    steps = harmonic[(above + samples).long()] - harmonic[above.long()]
    steps *= errors_above - errors * above / samples.clamp(min=1)
    return (steps.sum(1) + wrong[:, -1]) / n


def area_of(
    scores: Float[Tensor, " n"], positive: Bool[Tensor, " n"], weights: Num[Tensor, "r n"] | None = None
) -> Float[Tensor, " r"]:
    """Area under the ROC curve of arbitrary scores."""
    order = scores.argsort()
    ends = tie_ends(scores[order])
    weights = None if weights is None else weights[:, order]
    chosen = positive[order]
    return area(cumulative(chosen, weights, ends), cumulative(~chosen, weights, ends))
