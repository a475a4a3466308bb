"""What a report shows of one set of predictions: headline measures with intervals, curves, and a row a class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.core import checks, stats
from trimtab.core.stats import Interval
from trimtab.metrics import reliability, resampling, risk_coverage
from trimtab.metrics.binning import Ranked, bin_sums, rank
from trimtab.metrics.measures import Measured, Named, mean_losses, measure_logits, order, top_label
from trimtab.metrics.rows import Labels, Matrix, rows_of

HEADLINE_BINS = 15
_CELLS = 20
_POINTS = 200
_HEADLINE = {
    "accuracy": "accuracy",
    "ece": f"ECE_{HEADLINE_BINS}",
    "ece_em": f"ECE_em_{HEADLINE_BINS}",
    "mce": f"MCE_{HEADLINE_BINS}",
    "cw_ece": f"cwCE_{HEADLINE_BINS}",
    "log_loss": "NLL",
    "brier": "Brier",
    "auroc": "auroc",
    "aurc": "aurc",
    "mean_confidence": "mean_confidence",
}


@dataclass(frozen=True)
class Summary:
    """Plain data, ready for JSON.

    Args:
        n: rows.
        c: classes.
        headline: accuracy, ece, ece_em, mce, cw_ece (15 bins), log_loss, brier, auroc (right against wrong by
            confidence), aurc, mean_confidence, each with its interval.
        reliability: the arrays of `Reliability` by name, 15 bins.
        histogram: samples in 20 equal-width cells of the confidence.
        risk_coverage: at most 200 points (coverage, risk).
        per_class: ``count``, ``recall`` (NaN if the class does not occur), ``mean_probability`` and ``ece`` (15 bins),
            each with one number a class.
        interval_method: how the intervals were made, one sentence.
        level: coverage of the intervals.
    """

    n: int
    c: int
    headline: dict[str, Interval]
    reliability: dict[str, list[float]]
    histogram: list[int]
    risk_coverage: list[tuple[float, float]]
    per_class: dict[str, list[float]]
    interval_method: str
    level: float


def summarise(logits: Matrix, labels: Labels, *, resamples: int = 200, level: float = 0.95, seed: int = 0) -> Summary:
    """Summarise predictions in memory.

    Args:
        logits: unnormalised scores or log-probabilities (n, c), finite; tensor or array.
        labels: true classes (n,), integers in 0..c-1.
        resamples: bootstrap resamples behind every interval.
        level: coverage of the intervals and of the reliability curve's bands.
        seed: the same seed gives the same intervals.

    Raises:
        InputError: an argument is malformed.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
        >>> summary = summarise(logits, torch.tensor([0, 1, 0]), resamples=20)
        >>> round(summary.headline["accuracy"].estimate, 3), summary.per_class["recall"]
        (0.667, [0.5, 1.0])
    """
    z = checks.logits(logits).detach()
    y = checks.labels(labels, *z.shape).to(z.device)
    (measured,) = measure_logits(z, y, (1.0,), (HEADLINE_BINS,), kernel=False)
    weights = resampling.weights(len(z), resamples, seed, z.device)
    (resampled,) = measure_logits(z, y, (1.0,), (HEADLINE_BINS,), weights=weights, kernel=False)
    intervals = resampling.intervals(headline(measured), headline(resampled), level)
    correct = z.argmax(1) == y
    return assemble(measured, y, correct, intervals, resampling.bootstrap_sentence(resamples), level, (HEADLINE_BINS,))


def compare(
    before: Matrix, after: Matrix, labels: Labels, *, resamples: int = 200, level: float = 0.95, seed: int = 0
) -> dict[str, Interval]:
    """What a correction changes: after - before of the measures of `essentials`, bootstrapped in pairs.

    Both sides are measured on the same resamples, so that what they share cancels: the intervals are far narrower than
    those of two separate summaries suggest.

    Args:
        before: logits (n, c) without the correction.
        after: logits or log-probabilities (n, c) of the same rows with it.
        labels: true classes (n,), integers in 0..c-1.
        resamples: bootstrap resamples.
        level: coverage of the intervals.
        seed: the same seed gives the same intervals.

    Raises:
        InputError: an argument is malformed.

    Example:
        >>> import torch
        >>> logits, labels = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 2.0]]), torch.tensor([0, 1, 0])
        >>> compare(logits, logits, labels, resamples=20)["log_loss"]
        Interval(estimate=0.0, low=0.0, high=0.0)
    """
    z = checks.logits(before).detach()
    y = checks.labels(labels, *z.shape).to(z.device)
    other = checks.logits(after, "after", classes=z.shape[1]).detach()
    if len(other) != len(z):
        raise checks.InputError(f"after must have {len(z)} rows as before has, got {len(other)}")
    drawn = resampling.weights(len(z), resamples, seed, z.device)
    first, second = ([_essentials(x, y, weights) for weights in (None, drawn)] for x in (z, other))
    return resampling.changes(first, second, level)


def essentials(
    logits: Matrix, labels: Labels, *, resamples: int = 200, level: float = 0.95, seed: int = 0
) -> dict[str, Interval]:
    """The headline measures that need no pass over the classes: all of a `Summary` but cw_ece.

    For comparing many candidates; the arguments are those of `summarise`.

    Raises:
        InputError: an argument is malformed.

    Example:
        >>> import torch
        >>> logits, labels = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 2.0]]), torch.tensor([0, 1, 0])
        >>> round(essentials(logits, labels, resamples=20)["accuracy"].estimate, 3)
        0.667
    """
    z = checks.logits(logits).detach()
    y = checks.labels(labels, *z.shape).to(z.device)
    drawn = resampling.weights(len(z), resamples, seed, z.device)
    intervals = resampling.intervals(_essentials(z, y, None), _essentials(z, y, drawn), level)
    return _exact_accuracy(intervals, z.argmax(1) == y, level)


def _essentials(logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"], weights: Tensor | None) -> Named:
    (rows,), (losses,) = rows_of(logits, labels, (1.0,))
    ranked = rank(rows.confidence[None], rows.correct[None], weights)
    named = top_label(ranked, (HEADLINE_BINS,)) | order(ranked) | mean_losses(losses, weights)
    return {name: named[source] for name, source in _HEADLINE.items() if source in named}


def headline(measured: Measured) -> Named:
    """The headline measures, by the names that a summary gives them."""
    named = measured.named | order(measured.ranked)
    return {name: named[source] for name, source in _HEADLINE.items()}


def assemble(
    measured: Measured,
    labels: Int[Tensor, " n"],
    correct: Tensor,
    intervals: Mapping[str, Interval],
    interval_method: str,
    level: float,
    bins: Sequence[int],
) -> Summary:
    """Put a summary together from what was measured at one temperature with these bin counts."""
    ranked, _, by_class = measured
    c = len(by_class.width)
    count = torch.bincount(labels, minlength=c)
    recall = torch.bincount(labels[correct], minlength=c) / count
    curve = reliability.curve_of(bin_sums(ranked.values, ranked.hits, HEADLINE_BINS), level)
    return Summary(
        n=ranked.n,
        c=c,
        headline=_exact_accuracy(intervals, correct, level),
        reliability={name: values.tolist() for name, values in curve._asdict().items()},
        histogram=[int(k) for k in bin_sums(ranked.values, ranked.hits, _CELLS).samples[0]],
        risk_coverage=_some_points(ranked),
        per_class={
            "count": count.tolist(),
            "recall": recall.tolist(),
            "mean_probability": by_class.mean_probability[:, 0].tolist(),
            "ece": by_class.width[:, 0, bins.index(HEADLINE_BINS)].tolist(),
        },
        interval_method=interval_method,
        level=level,
    )


def _exact_accuracy(intervals: Mapping[str, Interval], correct: Tensor, level: float) -> dict[str, Interval]:
    """The intervals with Clopper and Pearson's for the accuracy: resamples of rows that are all right never err."""
    right, n = float(correct.sum()), float(len(correct))
    low, high = stats.binomial_interval(np.array([right]), np.array([n]), level)
    return {**intervals, "accuracy": Interval(right / n, float(low[0]), float(high[0]))}


def _some_points(ranked: Ranked) -> list[tuple[float, float]]:
    """The risk-coverage curve, thinned to points of about equal distance in coverage."""
    coverage, risk = risk_coverage.curve_of(ranked)
    wanted = torch.linspace(1 / _POINTS, 1, _POINTS, dtype=coverage.dtype, device=coverage.device)
    chosen = torch.unique(torch.searchsorted(coverage, wanted).clamp(max=len(coverage) - 1))
    return list(zip(coverage[chosen].tolist(), risk[chosen].tolist()))
