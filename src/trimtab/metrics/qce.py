"""Quantile calibration error: how often a Gaussian prediction's central interval holds the target, against how often it
should.

Where ENCE and UCE see the second moment alone, this one sees the shape: targets with heavy tails fail it even where
their variance is as stated. Over all samples (marginal) it is blind to spreads that are wrong in both directions; with
`bins` it is asked for within bins of the standard deviation (conditional).

Küppers, Schneider, Haselhoff 2022, arXiv 2207.01242: M-QCE and C-QCE, for one target at a time; bins are of equal width
from the smallest to the largest standard deviation, as in netcal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.core import checks
from trimtab.metrics.regression import GaussianMetric, Values, bin_means, bin_of, open_levels

_LEVELS = tuple(k / 20 for k in range(1, 20))


def quantile_calibration_error(
    mean: Values,
    std: Values,
    targets: Values,
    levels: Sequence[float] = _LEVELS,
    *,
    bins: int | None = None,
) -> float:
    """Mean over levels q of |share of targets in the central interval of probability q - q|.

    The interval is mean ± z std with z the standard normal quantile of (1 + q) / 2.

    Args:
        mean: predicted means (n,), in the units of the targets; tensor or array.
        std: predicted standard deviations (n,), > 0, in the same units.
        targets: what came (n,).
        levels: probabilities in (0, 1); 0.05, 0.10, .. 0.95 as in the paper's evaluation.
        bins: None for the marginal error; else the shares are taken in so many equal-width bins of the standard
            deviation, and the distances averaged with the bins' samples as weights.

    Returns:
        The error, in 0..1.

    Raises:
        InputError: an argument is malformed.

    Example:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> std, noise = torch.ones(20000), torch.randn(20000, generator=generator)
        >>> mean = torch.zeros(20000)
        >>> [round(quantile_calibration_error(mean, std, factor * noise), 2) for factor in (1, 2)]
        [0.0, 0.21]

    Reference:
        Küppers, Schneider, Haselhoff, ECCV Workshops 2022, arXiv 2207.01242.
    """
    metric = QuantileCalibrationError(levels, bins=bins)
    metric.update(mean, std, targets)
    return float(metric.compute())


class QuantileCalibrationError(GaussianMetric):
    """`quantile_calibration_error` over batches; its state is all standard deviations and errors.

    Example:
        >>> import torch
        >>> metric = QuantileCalibrationError([0.5])
        >>> metric.update(torch.zeros(4), torch.ones(4), torch.tensor([0.1, -0.2, 0.3, 2.0]))
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    def __init__(self, levels: Sequence[float] = _LEVELS, *, bins: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.levels = open_levels(levels)
        self.bins = None if bins is None else checks.integer(bins, "bins", low=1)

    def compute(self) -> Tensor:
        """The error of all batches together."""
        std, error = self._all()
        bins = 1 if self.bins is None else self.bins
        index, size = bin_of(std, bins), error.abs() / std
        distances = []
        for level in self.levels:
            bound = torch.special.ndtri(size.new_tensor((1 + level) / 2))
            samples, share = bin_means(index, bins, (size <= bound).double())
            distances.append(samples @ (share - level).abs() / len(std))
        return torch.stack(distances).mean()
