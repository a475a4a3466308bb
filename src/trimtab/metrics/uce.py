"""Uncertainty calibration error: how far a regression's stated variance is from its squared error.

The regression's twin of ECE, in squared units of the target: large variances decide. Where relative gaps matter take
`expected_normalised_calibration_error`.

Laves, Ihler, Fast, Kahrs, Ortmaier 2020, "Well-Calibrated Regression Uncertainty in Medical Imaging with Deep
Learning", MIDL. Bins are of equal width from the smallest to the largest variance, as in the paper and in netcal.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from trimtab.core import checks
from trimtab.metrics.regression import GaussianMetric, Values, bin_means, bin_of


def uncertainty_calibration_error(
    mean: Values, std: Values, targets: Values, bins: int = 10, *, equal_mass: bool = False
) -> float:
    """Sum over bins of the variance of (n_b / n) |mean squared error - mean predicted variance|.

    Args:
        mean: predicted means (n,), in the units of the targets; tensor or array.
        std: predicted standard deviations (n,), > 0, in the same units.
        targets: what came (n,).
        bins: number of bins; 10 as in netcal.
        equal_mass: bins of equally many samples instead of equal width.

    Returns:
        The error, at least 0, in squared units of the targets.

    Raises:
        InputError: an argument is malformed.

    Example:
        >>> import numpy as np
        >>> std, targets = np.array([1.0, 1.0, 2.0, 2.0]), np.array([1.5, -1.5, 2.0, -2.0])
        >>> uncertainty_calibration_error(np.zeros(4), std, targets, bins=2)
        0.625

    Reference:
        Laves et al., MIDL 2020.
    """
    metric = UncertaintyCalibrationError(bins, equal_mass=equal_mass)
    metric.update(mean, std, targets)
    return float(metric.compute())


class UncertaintyCalibrationError(GaussianMetric):
    """`uncertainty_calibration_error` over batches; its state is all standard deviations and errors.

    Example:
        >>> import torch
        >>> metric = UncertaintyCalibrationError(bins=2)
        >>> metric.update(torch.zeros(4), torch.tensor([1.0, 1.0, 2.0, 2.0]), torch.tensor([1.5, -1.5, 2.0, -2.0]))
        >>> metric.compute()
        tensor(0.6250, dtype=torch.float64)
    """

    def __init__(self, bins: int = 10, *, equal_mass: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.bins = checks.integer(bins, "bins", low=1)
        self.equal_mass = equal_mass

    def compute(self) -> Tensor:
        """The error of all batches together."""
        std, error = self._all()
        index = bin_of(std.square(), self.bins, self.equal_mass)
        samples, variance, squared = bin_means(index, self.bins, std.square(), error.square())
        return samples @ (squared - variance).abs() / len(std)
