"""Windows of similar probabilities: how far what is said and what happens are apart, and which way to move.

The arithmetic of the h-calibration loss (see `h_calibration`). While the events keep their order, the loss is piecewise
linear in the probabilities, so that both its value and its slopes are differences of prefix sums.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.metrics.binning import prefix

Weighting = Literal["cluace", "cluece", "unweighted", "ace", "ece", "den", "dst"]

_BINS = 15
_LLOYD_STEPS = 25


class Events(NamedTuple):
    """Every (sample, class) with its probability, by ascending probability."""

    order: Tensor  # where in the flattened (n, c) each stands
    value: Tensor
    gap: Tensor  # probability - outcome, float64
    label: Tensor  # of the sample
    top: Tensor  # whether the class is the one that the sample is predicted to be


def sorted_events(probs: Float[Tensor, "n c"], labels: Int[Tensor, " n"]) -> Events:
    """All events, by ascending probability; equal ones in the order of the rows."""
    c = probs.shape[1]
    value, order = probs.flatten().sort(stable=True)
    row, column = order // c, order % c
    label = labels[row]
    top = column == probs.argmax(1)[row]
    return Events(order, value, value.double() - (column == label).double(), label, top)


def window_errors(
    events: Events,
    left: Int[Tensor, " subsets"],
    shares: Float[Tensor, " subsets"],
    weighting: Weighting,
    window: int,
    epsilon: float,
    centroids: Float[Tensor, "subsets k"] | None = None,
) -> tuple[Float[Tensor, ""], Int[Tensor, " kept"], Float[Tensor, " kept"]]:
    """The weighted mean of the subsets' losses, and its slopes in the probabilities.

    Args:
        events: from `sorted_events`.
        left: the class whose samples each subset leaves out; -1 for none.
        shares: how much each subset counts.
        weighting, window, epsilon: of `HCalibrationLoss`.
        centroids: ascending, in place of k-means.

    Returns:
        The loss; the kept events of one subset after another, as places among all events; and the slope at each.
    """
    half, width = window // 2, window + 1
    subset, position = (events.label != left[:, None]).nonzero(as_tuple=True)
    sizes = torch.bincount(subset, minlength=len(left))
    end = sizes.cumsum(0)
    key = subset * (len(events.value) + 1) + position
    kept = _Kept(subset, position, key, end - sizes, end, events)
    place = torch.arange(len(position), device=position.device)
    low = torch.maximum(place - half, kept.start[subset])
    high = torch.minimum(place + half + 1, end[subset])

    gaps = _sums(events.gap[position])
    mean_gap = (gaps[high] - gaps[low]) / width
    errors = (mean_gap.abs() - epsilon).clamp(min=0)
    weights = _weights(weighting, window, kept, place, low, high, centroids) * shares[subset]
    pushes = _sums(weights * mean_gap.sign() * (errors > 0))
    return errors @ weights, position, (pushes[high] - pushes[low]) / width


def _weights(
    weighting: Weighting,
    window: int,
    kept: _Kept,
    place: Tensor,
    low: Tensor,
    high: Tensor,
    centroids: Tensor | None,
) -> Tensor:
    """How much every event's error counts in its subset's loss."""
    if weighting == "unweighted":
        return (1 / (kept.end - kept.start).double())[kept.subset]
    values = kept.events.value[kept.position].double()
    if weighting in ("den", "dst"):
        return _spread(weighting, window, kept, values, place, low, high)
    if weighting in ("ace", "ece"):
        edges = torch.linspace(0, 1, _BINS + 1).to(kept.events.value)
        first = torch.searchsorted(kept.events.value, edges[:-1])
        last = torch.searchsorted(kept.events.value, edges[1:], right=True)
        begin, end = kept.places(first[None]), kept.places(last[None])
    else:
        if centroids is None:
            centroids = _k_means(kept, values)
        bounds = kept.bounds(centroids)
        begin, end = bounds[:, :-1], bounds[:, 1:]
    share = 1 / ((end - begin).double() + 1e-5) / begin.shape[1]
    if weighting in ("ece", "cluece"):
        tops = _sums(kept.events.top[kept.position])
        counts = tops[end] - tops[begin]
        share *= counts / counts.sum(1, keepdim=True)
        if weighting == "cluece":
            share *= begin.shape[1]
    steps = values.new_zeros(len(values) + 1)
    steps.index_add_(0, begin.flatten(), share.flatten()).index_add_(0, end.flatten(), -share.flatten())
    return steps.cumsum(0)[:-1]


def _spread(
    weighting: Weighting, window: int, kept: _Kept, values: Tensor, place: Tensor, low: Tensor, high: Tensor
) -> Tensor:
    """Weights that are large where events are far apart."""
    half = window // 2
    if weighting == "den":
        last = (kept.end - 1)[kept.subset]
        return (values[torch.minimum(place + half, last)] - values[low]) / window
    sums = _sums(values)
    before, after = place - low, high - place - 1
    distance = (before - after) * values - (sums[place] - sums[low]) + (sums[high] - sums[place + 1])
    return distance / (before + after).clamp(min=1)


class _Kept(NamedTuple):
    """The events of several subsets, one after another."""

    subset: Tensor  # of every kept event
    position: Tensor  # of every kept event among all events
    key: Tensor  # both in one number, which ascends
    start: Tensor  # of every subset among the kept events
    end: Tensor
    events: Events

    def places(self, positions: Tensor) -> Tensor:
        """Where positions among all events fall among the kept events of every subset, (subsets, k)."""
        subsets = torch.arange(len(self.start), device=positions.device)[:, None]
        return torch.searchsorted(self.key, subsets * (len(self.events.value) + 1) + positions)

    def bounds(self, centroids: Tensor) -> Tensor:
        """Where the clusters of every subset begin and end: every event goes to the nearest centroid."""
        between = (centroids[:, :-1] + centroids[:, 1:]) / 2
        positions = torch.searchsorted(self.events.value, between.to(self.events.value).contiguous())
        return torch.cat([self.start[:, None], self.places(positions), self.end[:, None]], 1)


def _k_means(kept: _Kept, values: Tensor) -> Tensor:
    """Centroids of every subset by Lloyd's steps from quantiles of the distinct values, fewer than 15 if those are."""
    value = kept.events.value
    distinct = value[torch.cat([value.new_ones(1, dtype=torch.bool), value[1:] > value[:-1]])].double()
    k = min(_BINS, len(distinct))
    at = ((2 * torch.arange(k, device=value.device) + 1) * len(distinct)) // (2 * k)
    centroids = distinct[at].expand(len(kept.start), k)
    sums = _sums(values)
    bounds = None
    for _ in range(_LLOYD_STEPS):
        previous, bounds = bounds, kept.bounds(centroids)
        if previous is not None and torch.equal(bounds, previous):
            break
        counts = bounds.diff()
        centroids = torch.where(counts > 0, sums[bounds].diff() / counts.clamp(min=1), centroids)
    return centroids


def _sums(x: Tensor) -> Tensor:
    return prefix(x[None])[0]
