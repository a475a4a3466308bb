"""The named measures at a temperature, of the data as they are or of many resamples at once.

`calibration_suite`, its intervals, the summary of an audit and tables on disk all put these pieces together. The
measures are tensors with one entry a resample, or one entry where there are no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from trimtab.core.threads import one_thread
from trimtab.metrics import binning, kernels, ranking
from trimtab.metrics.binning import BINS, Ranked
from trimtab.metrics.rows import Losses, Rows, columns, probabilities, rows_of

MMCE_WIDTH = 0.4
_PART_ELEMENTS = 1 << 21

COLUMNS = (
    *(f"{family}_{b}" for family in ("ECE", "ECE_em", "cwCE", "cwCE_em", "MCE") for b in BINS),
    *("KSCE", "KDECE", "MMCE", "NLL", "Brier"),
)
"""The fifty measures at one temperature, in the study's order; its columns have ``pre_`` or ``post_`` before them."""

Named = dict[str, Tensor]
Columns = Callable[[], Iterable[tuple[int, Float[Tensor, "g n"]]]]


class ClassErrors(NamedTuple):
    """Calibration errors class by class for every bin count, and each class's mean probability."""

    width: Float[Tensor, "c r bins"]
    mass: Float[Tensor, "c r bins"]
    mean_probability: Float[Tensor, "c r"]


class Measured(NamedTuple):
    """Everything measured at one temperature."""

    ranked: Ranked
    named: Named
    by_class: ClassErrors


@one_thread()
def measure_logits(
    logits: Float[Tensor, "n c"],
    labels: Int[Tensor, " n"],
    temperatures: Sequence[float],
    bins: Sequence[int],
    *,
    classes: int | None = None,
    weights: Num[Tensor, "r n"] | None = None,
    kernel: bool = True,
) -> list[Measured]:
    """Measure logits in memory; the arguments are those of `measure`."""
    rows, losses = rows_of(logits, labels, temperatures)
    means = [mean_losses(loss, weights) for loss in losses]
    del losses
    classwise = partial(columns, logits)
    return measure(rows, means, classwise, labels, temperatures, bins, classes=classes, weights=weights, kernel=kernel)


@one_thread()
def measure(
    rows: Sequence[Rows],
    means: Sequence[Named],
    columns: Columns,
    labels: Int[Tensor, " n"],
    temperatures: Sequence[float],
    bins: Sequence[int],
    *,
    classes: int | None = None,
    weights: Num[Tensor, "r n"] | None = None,
    kernel: bool = True,
) -> list[Measured]:
    """All measures of the benchmark at every temperature.

    Args:
        rows: the rows at each temperature.
        means: mean NLL and Brier score at each temperature.
        columns: called for an iterator over (first class, logits of some classes as rows).
        labels: true classes.
        temperatures: as many as `rows`.
        bins: bin counts.
        classes: class-wise means are over the first so many classes; None for all.
        weights: how often each sample counts in each resample.
        kernel: whether to include KDECE and MMCE.
    """
    by_class = class_errors(columns(), rows, temperatures, labels, bins, weights)
    out = []
    for row, mean, temperature, errors in zip(rows, means, temperatures, by_class):
        ranked = binning.rank(row.confidence[None], row.correct[None], weights)
        named = top_label(ranked, bins) | class_means(errors, bins, classes) | mean
        if kernel:
            density = ranked
            if len(errors.width) == 2:  # as the authors do: the probability of class 1, not of the larger one
                second = torch.cat([logits for _, logits in columns()])[1:]
                density = binning.rank(probabilities(second, row, temperature), labels[None] == 1, weights)
            named |= _in_parts(lambda part: {"KDECE": kernels.density_error(part)}, density)
            named |= _in_parts(lambda part: {"MMCE": kernels.laplace_error(part, MMCE_WIDTH)}, ranked)
        out.append(Measured(ranked, named, errors))
    return out


def study_columns(named: Sequence[Named]) -> Named:
    """The study's columns, of the measures before and after temperature scaling."""
    return {f"{when}_{name}": each[name] for when, each in zip(("pre", "post"), named) for name in COLUMNS}


@one_thread()
def top_label(ranked: Ranked, bins: Sequence[int]) -> Named:
    """ECE, ECE_em and MCE for every bin count, and KSCE."""
    width = binning.equal_width(ranked, bins)
    last = binning.last_of_ties(ranked.values[0])

    def measure(part: Ranked) -> Named:
        gap, mass = binning.gap_sums(part), binning.mass_sums(part)
        errors = {
            "ECE": binning.expected_errors(gap, width, bins),
            "ECE_em": binning.expected_errors(gap, binning.equal_mass(part, mass, bins), bins),
            "MCE": binning.maximum_errors(gap, mass, width, bins),
        }
        return _by_bin_count(errors, bins) | {"KSCE": binning.largest_partial_sum(gap, last)}

    return _in_parts(measure, ranked)


@one_thread()
def order(ranked: Ranked) -> Named:
    """How well confidence tells right from wrong: accuracy, mean confidence, AUROC, area under the risk."""
    values, hits = ranked.values[0], ranked.hits[0]
    ends = binning.tie_ends(values)

    def measure(part: Ranked) -> Named:
        right = ranking.cumulative(hits, part.weights, ends)
        wrong = ranking.cumulative(~hits, part.weights, ends)
        return {
            "accuracy": right[:, -1] / ranked.n,
            "mean_confidence": _mean(values, part.weights),
            "auroc": ranking.area(right, wrong),
            "aurc": ranking.area_under_risk(right + wrong, wrong),
        }

    return _in_parts(measure, ranked)


def mean_losses(losses: Losses, weights: Num[Tensor, "r n"] | None = None) -> Named:
    """NLL and Brier score."""
    return {"NLL": _mean(losses.log_loss, weights), "Brier": _mean(losses.brier, weights)}


def class_errors(
    columns: Iterable[tuple[int, Float[Tensor, "g n"]]],
    rows: Sequence[Rows],
    temperatures: Sequence[float],
    labels: Int[Tensor, " n"],
    bins: Sequence[int],
    weights: Num[Tensor, "r n"] | None = None,
) -> list[ClassErrors]:
    """The errors of every class at every temperature, in one pass over the classes."""
    found: list[list[ClassErrors]] = [[] for _ in rows]
    for first, logits in columns:
        classes = torch.arange(first, first + len(logits), device=labels.device)
        hits = labels == classes[:, None]
        for row, temperature, errors in zip(rows, temperatures, found):
            errors.append(errors_of(probabilities(logits, row, temperature), hits, bins, weights))
    return [ClassErrors(*(torch.cat(parts) for parts in zip(*errors))) for errors in found]


def errors_of(
    p: Float[Tensor, "g n"],
    hits: Bool[Tensor, "g n"],
    bins: Sequence[int],
    weights: Num[Tensor, "r n"] | None = None,
) -> ClassErrors:
    """The errors of some classes whose probabilities are given as rows."""

    def measure(part: Ranked) -> Named:
        gap, mass = binning.gap_sums(part), binning.mass_sums(part)
        return {
            "width": binning.expected_errors(gap, binning.equal_width(part, bins), bins),
            "mass": binning.expected_errors(gap, binning.equal_mass(part, mass, bins), bins),
            "mean_probability": (_count(part) - gap[:, -1]) / part.n,
        }

    if weights is None:
        errors = measure(binning.rank(p, hits))
        return ClassErrors(*(errors[name][:, None] for name in ClassErrors._fields))
    each = [_in_parts(measure, binning.rank(one[None], hit[None], weights)) for one, hit in zip(p, hits)]
    return ClassErrors(*(torch.stack([errors[name] for errors in each]) for name in ClassErrors._fields))


def _count(ranked: Ranked) -> Float[Tensor, " r"]:
    """How many hits there are."""
    hits = ranked.hits.sum(1) if ranked.weights is None else (ranked.weights * ranked.hits).sum(1)
    return hits.double()


def class_means(errors: ClassErrors, bins: Sequence[int], classes: int | None) -> Named:
    """cwCE and cwCE_em for every bin count: the mean over the first `classes` classes."""
    means = {"cwCE": errors.width[:classes].mean(0), "cwCE_em": errors.mass[:classes].mean(0)}
    return _by_bin_count(means, bins)


def _by_bin_count(errors: Named, bins: Sequence[int]) -> Named:
    return {f"{name}_{b}": errors[name][:, i] for name in errors for i, b in enumerate(bins)}


def _mean(x: Float[Tensor, " n"], weights: Num[Tensor, "r n"] | None) -> Float[Tensor, " r"]:
    """Mean in float64."""
    if weights is None:
        return x.mean(0, keepdim=True, dtype=torch.float64)
    return torch.cat([part.double() @ x.double() for part in torch.split(weights, _part(len(x)))]) / len(x)


def _in_parts(measure: Callable[[Ranked], Named], ranked: Ranked) -> Named:
    """Measure some resamples at a time, so that memory stays bounded."""
    if ranked.weights is None:
        return measure(ranked)
    parts = [measure(ranked._replace(weights=w)) for w in torch.split(ranked.weights, _part(ranked.n))]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _part(n: int) -> int:
    return max(1, _PART_ELEMENTS // n)
