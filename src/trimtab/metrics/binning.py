"""What all binned measures share: one sort, prefix sums, and where the bins' edges fall in the sorted order.

In a bin, n_b |mean hit - mean probability| = |sum of (hit - probability)|. So with probabilities sorted once and the
gaps (hit - probability) summed up along the order in float64, the error of any bin is a difference of two prefix sums,
and a further bin count costs a look-up of its edges, not another pass over the data.

A bootstrap resample keeps the sorted order and only changes how often each sample counts: the same functions take the
counts of r resamples as weights and return r errors.

Shapes: g columns of probabilities (classes) or r resamples of one column; g = 1 where there are weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Num, Shaped
from torch import Tensor

BINS = (5, 10, 15, 20, 25, 50, 100, 200, 500)
"""The bin counts of the benchmark study."""

_CHUNK_ELEMENTS = 1 << 18


class Ranked(NamedTuple):
    """Probabilities in ascending order, whether the event of each happened, and how often each counts."""

    values: Float[Tensor, "g n"]
    hits: Bool[Tensor, "g n"]
    weights: Num[Tensor, "r n"] | None

    @property
    def n(self) -> int:
        """Number of samples."""
        return self.values.shape[1]


def rank(values: Float[Tensor, "g n"], hits: Bool[Tensor, "g n"], weights: Num[Tensor, "r n"] | None = None) -> Ranked:
    """Sort probabilities in 0..1, float32 or float64, and let hits and weights follow.

    Without weights the hit rides in the lowest bit of the number that is sorted: the bits of non-negative floats sort
    as integers do, and sorting integers is several times quicker than sorting positions.
    """
    if weights is not None:
        order = _argsort(values[0])
        return Ranked(values[:, order], hits[:, order], weights[:, order])
    packed = values.contiguous().view(torch.int32 if values.dtype == torch.float32 else torch.int64) * 2
    packed += hits
    packed = _sort(packed)
    hits = (packed & 1).bool()
    packed >>= 1
    return Ranked(packed.view(values.dtype), hits, None)


def _sort(x: Tensor) -> Tensor:
    """Ascending along the last axis; in place on the CPU, by numpy, whose sort is vectorised."""
    if x.device.type != "cpu":
        return x.sort(-1).values
    x.numpy().sort(axis=-1)
    return x


def _argsort(x: Tensor) -> Tensor:
    return torch.from_numpy(x.numpy().argsort()) if x.device.type == "cpu" else x.argsort()


def prefix(x: Shaped[Tensor, "r n"]) -> Float[Tensor, "r m"]:
    """Prefix sums along the last axis in float64, beginning with 0: m = n + 1."""
    sums = x.new_empty((x.shape[0], x.shape[1] + 1), dtype=torch.float64)
    sums[:, 0] = 0
    torch.cumsum(x, 1, dtype=torch.float64, out=sums[:, 1:])
    return sums


def gap_sums(ranked: Ranked) -> Float[Tensor, "r m"]:
    """Prefix sums of hit - probability, each as often as it counts."""
    gap = ranked.hits.to(ranked.values.dtype).sub_(ranked.values)
    return prefix(gap if ranked.weights is None else ranked.weights * gap.double())


def mass_sums(ranked: Ranked) -> Int[Tensor, "r m"] | None:
    """Prefix sums of the weights: how many samples of the resample lie before each place; None without weights."""
    if ranked.weights is None:
        return None
    sums = ranked.weights.new_zeros((ranked.weights.shape[0], ranked.n + 1), dtype=torch.int64)
    torch.cumsum(ranked.weights, 1, dtype=torch.int64, out=sums[:, 1:])
    return sums


def equal_width(ranked: Ranked, bins: Sequence[int]) -> Int[Tensor, "g edges"]:
    """Places of the edges k/B, k = 0..B, for each B of `bins`, one after another.

    Bins are (lower, upper]; the first holds 0 too, and the last all that is above its lower edge. Edges are rounded to
    the precision of the probabilities, so that the float nearest to 0.2 is on the edge 0.2.
    """
    edges = torch.cat([torch.arange(b + 1, dtype=torch.float64) / b for b in bins])
    edges[edges == 0], edges[edges == 1] = -1, 2
    values = ranked.values
    return _places(values, edges.to(values).expand(len(values), -1).contiguous())


def equal_mass(
    ranked: Ranked, mass: Int[Tensor, "r m"] | None, bins: Sequence[int], *, include_lowest: bool = False
) -> Int[Tensor, "r edges"]:
    """Places of the quantile edges for each B of `bins`, one after another.

    The benchmark's edges are linear interpolations of the sorted values at the positions k n / B. Since an
    interpolated edge lies between two neighbours, the samples up to it are those up to the neighbour at
    floor(k n / B), with all that tie with it. In a resample the positions run over its repeated values.

    Bins are (lower, upper] and the lowest edge is the smallest value, which so falls in no bin, unless
    `include_lowest`, or unless all values are equal: then there is one bin that holds them all.
    """
    n = ranked.n
    at = torch.cat([torch.arange(b + 1) * n // b for b in bins]).clamp(max=n - 1).to(ranked.values.device)
    if mass is None:
        at = at.expand(len(ranked.values), -1)
    else:
        at = torch.searchsorted(mass[:, 1:].contiguous(), at.expand(len(mass), -1).contiguous(), right=True)
    values = ranked.values.expand(len(at), -1)
    places = _places(ranked.values, values.gather(1, at))
    parts = torch.split(places, [b + 1 for b in bins], 1)
    for part in parts:
        part[:, 0] = 0 if include_lowest else torch.where(part[:, 0] == part[:, -1], 0, part[:, 0])
    return places


def equal_count(ranked: Ranked, bins: int) -> Int[Tensor, "g edges"]:
    """Places of the edges of bins of equally many samples: sizes differ by one at most, the first are the larger.

    Values that tie are in one bin, that of the first of them. Every value is in a bin.
    """
    k = torch.arange(bins + 1, device=ranked.values.device)
    at = k * (ranked.n // bins) + k.clamp(max=ranked.n % bins)
    last = ranked.values.gather(1, (at - 1).clamp(min=0).expand(len(ranked.values), -1))
    places = _places(ranked.values, last.contiguous())
    places[:, at == 0] = 0
    return places


def _places(values: Float[Tensor, "g n"], edges: Float[Tensor, "r edges"]) -> Int[Tensor, "r edges"]:
    """How many values are at or below each edge."""
    return torch.searchsorted(values[0] if len(values) == 1 else values, edges, right=True)


def expected_errors(
    gap: Float[Tensor, "r m"], places: Int[Tensor, "g edges"], bins: Sequence[int]
) -> Float[Tensor, "r bins"]:
    """The expected error of each binning: sum over bins of |sum of gaps| / n."""
    at = gap.gather(1, places.expand(len(gap), -1))
    parts = torch.split(at, [b + 1 for b in bins], 1)
    return torch.stack([part.diff().abs().sum(1) for part in parts], 1) / (gap.shape[1] - 1)


def maximum_errors(
    gap: Float[Tensor, "r m"], mass: Int[Tensor, "r m"] | None, places: Int[Tensor, "g edges"], bins: Sequence[int]
) -> Float[Tensor, "r bins"]:
    """The largest |mean gap| of a bin that is not empty, for each binning."""
    widths = [b + 1 for b in bins]
    places = places.expand(len(gap), -1)
    counts = places if mass is None else mass.gather(1, places)
    errors = [
        (sums.diff().abs() / count.diff().clamp(min=1)).amax(1)
        for sums, count in zip(torch.split(gap.gather(1, places), widths, 1), torch.split(counts, widths, 1))
    ]
    return torch.stack(errors, 1)


def last_of_ties(values: Float[Tensor, " n"]) -> Bool[Tensor, " n"]:
    """Which of the sorted values are the last of their group of equals."""
    last = torch.ones(len(values), dtype=torch.bool, device=values.device)
    torch.ne(values[1:], values[:-1], out=last[:-1])
    return last


def tie_ends(values: Float[Tensor, " n"]) -> Int[Tensor, " groups"]:
    """Where the groups of equal sorted values end, as places: the first value's group ends at the first entry."""
    return last_of_ties(values).nonzero()[:, 0] + 1


def largest_partial_sum(gap: Float[Tensor, "r m"], last: Bool[Tensor, " n"]) -> Float[Tensor, " r"]:
    """The largest |mean of all gaps up to some value|: the Kolmogorov-Smirnov distance of hits and probabilities."""
    largest = torch.zeros_like(gap[:, 0])
    for sums, ends in zip(torch.split(gap[:, 1:], _CHUNK_ELEMENTS, 1), torch.split(last, _CHUNK_ELEMENTS)):
        largest = torch.maximum(largest, (sums.abs() * ends).amax(1))
    return largest / len(last)


class BinSums(NamedTuple):
    """What falls in equal-width bins: how many samples, the sum of their probabilities, and how many are hits."""

    samples: Float[Tensor, "g bins"]
    probability: Float[Tensor, "g bins"]
    hits: Float[Tensor, "g bins"]

    @property
    def gap(self) -> Float[Tensor, "g bins"]:
        """Sum of hit - probability."""
        return self.hits - self.probability


def bin_sums(values: Float[Tensor, "g n"], hits: Bool[Tensor, "g n"], bins: int) -> BinSums:
    """Sums over equal-width bins without a sort: what a metric adds up batch by batch."""
    g = len(values)
    edges = (torch.arange(1, bins, dtype=torch.float64) / bins).to(values)
    offset = bins * torch.arange(g, device=values.device)[:, None]
    total = torch.zeros(3, g * bins, dtype=torch.float64, device=values.device)
    size = max(1, _CHUNK_ELEMENTS // g)
    for p, hit in zip(torch.split(values, size, 1), torch.split(hits, size, 1)):
        at = (torch.bucketize(p.contiguous(), edges) + offset).flatten()
        total[0] += torch.bincount(at, minlength=g * bins)
        total[1] += torch.bincount(at, p.double().flatten(), minlength=g * bins)
        total[2] += torch.bincount(at[hit.flatten()], minlength=g * bins)
    return BinSums(*total.view(3, g, bins))
