"""Expected calibration error over bins of equal mass: every bin holds the same number of samples.

Networks put most of their confidences near one, where equal-width bins see nothing but a crowd. Bins of equal mass
resolve it, and their noise is even.

Nguyen, O'Connor 2015, arXiv 1508.05154 ("Posterior calibration and exploratory analysis"); Mukhoti et al. 2020, arXiv
2002.09437, whose code the benchmark study uses. In that code the bins are (lower, upper] and the lowest edge is the
smallest confidence, so the samples with the smallest confidence are counted in no bin. That is the default here, for
the same numbers; `include_lowest` counts them in the first bin. It matters where many samples share the smallest value.
Where all confidences are equal the code's bins are all empty and its error 0; here that is one bin.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from trimtab.core import checks
from trimtab.metrics.binning import equal_mass, expected_errors, gap_sums
from trimtab.metrics.confidences import ConfidenceMetric
from trimtab.metrics.rows import Labels, Matrix


def expected_calibration_error_equal_mass(
    probs: Matrix, labels: Labels, bins: int = 15, *, include_lowest: bool = False
) -> float:
    """Sum over bins of (n_b / n) |accuracy - mean confidence|, edges being quantiles of the confidence.

    Args:
        probs: probabilities (n, c), rows sum to one; tensor or array.
        labels: true classes (n,), integers in 0..c-1.
        bins: number of bins; 15 as in Mukhoti et al. Bins between equal edges are empty and left out.
        include_lowest: count the smallest confidence in the first bin, which the benchmark's code does not.

    Returns:
        The error, in 0..1.

    Raises:
        InputError: probabilities, labels or bins are malformed.

    Example:
        >>> import numpy as np
        >>> probs = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6]])
        >>> labels = np.array([0, 0, 1, 0])
        >>> round(expected_calibration_error_equal_mass(probs, labels, bins=2), 3)
        0.15
        >>> round(expected_calibration_error_equal_mass(probs, labels, bins=2, include_lowest=True), 3)
        0.05

    Reference:
        Nguyen, O'Connor, arXiv 1508.05154; Mukhoti et al., arXiv 2002.09437.
    """
    metric = ExpectedCalibrationErrorEqualMass(bins, include_lowest=include_lowest)
    metric.update(probs, labels)
    return float(metric.compute())


class ExpectedCalibrationErrorEqualMass(ConfidenceMetric):
    """`expected_calibration_error_equal_mass` over batches; its state is all confidences, as quantiles need them.

    Example:
        >>> import torch
        >>> metric = ExpectedCalibrationErrorEqualMass(bins=2)
        >>> metric.update(torch.tensor([[0.75, 0.25], [0.25, 0.75]]), torch.tensor([0, 1]))
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    higher_is_better = False

    def __init__(self, bins: int = 15, *, include_lowest: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.bins = checks.integer(bins, "bins", low=1)
        self.include_lowest = include_lowest

    def compute(self) -> Tensor:
        """The error of all batches together."""
        ranked = self._ranked()
        places = equal_mass(ranked, None, [self.bins], include_lowest=self.include_lowest)
        return expected_errors(gap_sums(ranked), places, [self.bins])[0, 0]
