"""Maximum mean calibration error: a kernel's view of the gap between hits and confidences, without bins.

Two samples whose confidences are near count together; a positive mean of their gaps' products means that gaps go the
same way where confidences agree. Reach for it where a smooth measure is wanted; it is the one here that has a
trainable twin.

Kumar, Sarawagi, Jain 2018, "Trainable Calibration Measures for Neural Networks from Kernel Mean Embeddings", ICML. The
definition is netcal's: Laplace kernel of width 0.4 and no weighting of right and wrong predictions, which the paper's
training loss has. Sums over all pairs take O(n^2) there; along sorted confidences the Laplace kernel factorises, and
the same sum is a prefix sum: O(n log n), exactly.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from trimtab.core import checks
from trimtab.core.threads import one_thread
from trimtab.metrics.confidences import ConfidenceMetric
from trimtab.metrics.kernels import laplace_error
from trimtab.metrics.rows import Labels, Matrix


@one_thread()
def maximum_mean_calibration_error(probs: Matrix, labels: Labels, width: float = 0.4) -> float:
    """sqrt((1/n^2) sum over pairs of (hit_i - p_i)(hit_j - p_j) exp(-|p_i - p_j| / width)), p the confidence.

    Args:
        probs: probabilities (n, c), rows sum to one; tensor or array.
        labels: true classes (n,), integers in 0..c-1.
        width: width of the Laplace kernel, at least 0.01; 0.4 as in Kumar et al. and netcal.

    Returns:
        The error, in 0..1.

    Raises:
        InputError: probabilities, labels or width are malformed.

    Example:
        >>> import numpy as np
        >>> probs = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6]])
        >>> round(maximum_mean_calibration_error(probs, np.array([0, 0, 1, 0])), 4)
        0.1056

    Reference:
        Kumar, Sarawagi, Jain, ICML 2018.
    """
    metric = MaximumMeanCalibrationError(width)
    metric.update(probs, labels)
    return float(metric.compute())


class MaximumMeanCalibrationError(ConfidenceMetric):
    """`maximum_mean_calibration_error` over batches; its state is all confidences.

    Example:
        >>> import torch
        >>> metric = MaximumMeanCalibrationError()
        >>> metric.update(torch.tensor([[0.75, 0.25], [0.25, 0.75]]), torch.tensor([0, 1]))
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    higher_is_better = False

    def __init__(self, width: float = 0.4, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.width = checks.number(width, "width", low=0.01)

    def compute(self) -> Tensor:
        """The error of all batches together."""
        ranked = self._ranked()
        return laplace_error(ranked, self.width)[0]
