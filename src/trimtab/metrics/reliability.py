"""The reliability diagram as data: accuracy against confidence, bin by bin, with exact bands.

The picture behind ECE. Look at it before any single number: it shows where the model is over- or under-confident, and
the bands show where there are too few samples to tell.

DeGroot, Fienberg 1983; Niculescu-Mizil, Caruana 2005. Bands are Clopper and Pearson's (1934), which cover at least the
stated share whatever the accuracy.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trimtab.core import checks, stats
from trimtab.metrics.binning import BinSums, bin_sums
from trimtab.metrics.rows import Labels, Matrix, top_label
from trimtab.metrics.sums import SumMetric


class Reliability(NamedTuple):
    """The bins that hold a sample, as arrays of equal length.

    Attributes:
        lower: lower edge of the bin.
        upper: upper edge.
        count: samples in the bin.
        confidence: mean confidence in the bin.
        accuracy: share of right predictions in the bin.
        accuracy_low: lower end of the accuracy's interval.
        accuracy_high: upper end.
    """

    lower: np.ndarray
    upper: np.ndarray
    count: np.ndarray  # type: ignore[assignment]
    confidence: np.ndarray
    accuracy: np.ndarray
    accuracy_low: np.ndarray
    accuracy_high: np.ndarray


def reliability_curve(probs: Matrix, labels: Labels, bins: int = 15, level: float = 0.95) -> Reliability:
    """Mean confidence and accuracy in equal-width bins of the confidence, empty bins left out.

    Args:
        probs: probabilities (n, c), rows sum to one; tensor or array.
        labels: true classes (n,), integers in 0..c-1.
        bins: equal-width bins (lower, upper] in 0..1; 15 as in `expected_calibration_error`.
        level: coverage of the band, in 0..1.

    Raises:
        InputError: an argument is malformed.

    Example:
        >>> import numpy as np
        >>> curve = reliability_curve(np.array([[0.9, 0.1], [0.7, 0.3], [0.3, 0.7]]), np.array([0, 0, 0]), bins=5)
        >>> curve.count.tolist(), curve.accuracy.tolist(), curve.lower.round(1).tolist()
        ([2, 1], [0.5, 1.0], [0.6, 0.8])

    Reference:
        Niculescu-Mizil, Caruana, ICML 2005; Clopper, Pearson, Biometrika 1934.
    """
    checks.integer(bins, "bins", low=1)
    confidence, correct = top_label(probs, labels)
    return curve_of(bin_sums(confidence[None], correct[None], bins), level)


def curve_of(sums: BinSums, level: float) -> Reliability:
    """The curve of one column's sums in bins."""
    samples, probability, hits = (x[0].cpu().numpy() for x in sums)
    held = samples > 0
    bins = np.flatnonzero(held)
    n, right = samples[held], hits[held]
    low, high = stats.binomial_interval(right, n, level)
    edges = np.arange(len(samples) + 1) / len(samples)
    return Reliability(edges[bins], edges[bins + 1], n.astype(int), probability[held] / n, right / n, low, high)


class ReliabilityCurve(SumMetric):
    """`reliability_curve` over batches; its state is three sums a bin.

    Example:
        >>> import torch
        >>> metric = ReliabilityCurve(bins=5)
        >>> metric.update(torch.tensor([[0.9, 0.1], [0.7, 0.3], [0.3, 0.7]]), torch.tensor([0, 0, 0]))
        >>> metric.compute().accuracy.tolist()
        [0.5, 1.0]
    """

    sums: Tensor

    def __init__(self, bins: int = 15, level: float = 0.95, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.bins = checks.integer(bins, "bins", low=1)
        self.level = checks.number(level, "level", low=0, high=1, low_open=True, high_open=True)
        self._sum(sums=(3, 1, bins))

    def update(self, probs: Matrix, labels: Labels) -> None:
        """Add a batch: probabilities (n, c) and labels (n,)."""
        confidence, correct = top_label(probs, labels)
        self.sums += torch.stack(bin_sums(confidence[None], correct[None], self.bins))

    def compute(self) -> Reliability:
        """The curve of all batches together."""
        return curve_of(BinSums(*self.sums), self.level)
