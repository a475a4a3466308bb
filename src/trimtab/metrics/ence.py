"""Expected normalised calibration error: how far a regression's stated spread is from its error, in per cent of it.

A model that states a standard deviation for every prediction should be off by that much, root mean square, whatever the
size of the standard deviation. Reach for this one where the spread ranges over orders of magnitude: every bin counts by
its relative gap. It has no units.

Levi, Gispan, Giladi, Fetaya 2019, arXiv 1905.11659. Bins are of equal width from the smallest to the largest standard
deviation, as in netcal; a few very unsure predictions then leave most bins empty, and ``equal_mass=True`` is sounder.
Empty bins are left out.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from trimtab.core import checks
from trimtab.metrics.regression import GaussianMetric, Values, bin_means, bin_of


def expected_normalised_calibration_error(
    mean: Values, std: Values, targets: Values, bins: int = 10, *, equal_mass: bool = False
) -> float:
    """Mean over bins of the standard deviation of |RMV - RMSE| / RMV.

    RMV is the root of the mean predicted variance in the bin, RMSE the root of the mean squared error.

    Args:
        mean: predicted means (n,), in the units of the targets; tensor or array.
        std: predicted standard deviations (n,), > 0, in the same units.
        targets: what came (n,).
        bins: number of bins; 10 as in netcal.
        equal_mass: bins of equally many samples instead of equal width.

    Returns:
        The error, at least 0, without units: 0.1 is ten per cent.

    Raises:
        InputError: an argument is malformed.

    Example:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> std = 1 + torch.rand(20000, generator=generator)
        >>> targets = 1.2 * std * torch.randn(20000, generator=generator)  # a fifth more than stated
        >>> round(expected_normalised_calibration_error(torch.zeros(20000), std, targets), 1)
        0.2

    Reference:
        Levi et al., Evaluating and Calibrating Uncertainty Prediction in Regression Tasks, arXiv 1905.11659.
    """
    metric = ExpectedNormalisedCalibrationError(bins, equal_mass=equal_mass)
    metric.update(mean, std, targets)
    return float(metric.compute())


class ExpectedNormalisedCalibrationError(GaussianMetric):
    """`expected_normalised_calibration_error` over batches; its state is all standard deviations and errors.

    Example:
        >>> import torch
        >>> metric = ExpectedNormalisedCalibrationError(bins=2)
        >>> metric.update(torch.zeros(4), torch.tensor([1.0, 1.0, 2.0, 2.0]), torch.tensor([1.5, -1.5, 2.0, -2.0]))
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    def __init__(self, bins: int = 10, *, equal_mass: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.bins = checks.integer(bins, "bins", low=1)
        self.equal_mass = equal_mass

    def compute(self) -> Tensor:
        """The error of all batches together."""
        std, error = self._all()
        index = bin_of(std, self.bins, self.equal_mass)
        _, variance, squared = bin_means(index, self.bins, std.square(), error.square())
        return ((variance.sqrt() - squared.sqrt()).abs() / variance.sqrt()).mean()
