"""Average calibration error: the mean over bins of the distance between accuracy and confidence, each bin as one.

ECE weighs a bin by its samples, and where a network is nearly always sure the other bins hardly count. Reach for this
one where every level of confidence should; its price is the noise of bins with few samples.

Neumann, Zisserman, Vedaldi 2018, "Relaxed Softmax: Efficient Confidence Auto-Calibration for Safe Pedestrian
Detection". As in netcal's ACE, empty bins are left out. It is not the "adaptive calibration error" of Nixon et al.,
which `classwise_calibration_error_equal_mass` gives.
"""

from __future__ import annotations

from torch import Tensor

from trimtab.metrics.confidences import ConfidenceBins
from trimtab.metrics.rows import Labels, Matrix


def average_calibration_error(probs: Matrix, labels: Labels, bins: int = 15) -> float:
    """Mean over the equal-width bins that hold a sample of |accuracy - mean confidence|.

    Args:
        probs: probabilities (n, c), rows sum to one; tensor or array.
        labels: true classes (n,), integers in 0..c-1.
        bins: equal-width bins (lower, upper] of the confidence in 0..1; 15 as in `expected_calibration_error`.

    Returns:
        The error, in 0..1.

    Raises:
        InputError: probabilities, labels or bins are malformed.

    Example:
        >>> import numpy as np
        >>> probs = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6]])
        >>> round(average_calibration_error(probs, np.array([0, 0, 1, 0])), 3)
        0.3

    Reference:
        Neumann, Zisserman, Vedaldi, NIPS Workshop MLITS 2018.
    """
    metric = AverageCalibrationError(bins)
    metric.update(probs, labels)
    return float(metric.compute())


class AverageCalibrationError(ConfidenceBins):
    """`average_calibration_error` over batches; its state is two sums a bin.

    Example:
        >>> import torch
        >>> metric = AverageCalibrationError(bins=10)
        >>> metric.update(torch.tensor([[0.75, 0.25], [0.45, 0.55]]), torch.tensor([0, 0]))
        >>> metric.compute()
        tensor(0.4000, dtype=torch.float64)
    """

    def compute(self) -> Tensor:
        """The error of all batches together."""
        held = self.samples > 0
        return (self.gap[held].abs() / self.samples[held]).mean()
