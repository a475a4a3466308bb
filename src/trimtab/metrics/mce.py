"""Maximum calibration error: the worst bin's distance between accuracy and confidence.

Reach for it where a single badly calibrated region matters. It is dominated by the bin with the fewest samples, and so
by chance: in the benchmark study it is the one measure that does not rank networks as the others do.

Naeini, Cooper, Hauskrecht 2015, "Obtaining Well Calibrated Probabilities Using Bayesian Binning".
"""

from __future__ import annotations

from torch import Tensor

from trimtab.core import checks
from trimtab.metrics.binning import bin_sums
from trimtab.metrics.confidences import ConfidenceBins
from trimtab.metrics.rows import Labels, Matrix, top_label


def maximum_calibration_error(probs: Matrix, labels: Labels, bins: int = 15) -> float:
    """The largest |accuracy - mean confidence| of an equal-width bin that holds a sample.

    Args:
        probs: probabilities (n, c), rows sum to one; tensor or array.
        labels: true classes (n,), integers in 0..c-1.
        bins: equal-width bins (lower, upper] of the confidence in 0..1; 15 as in Guo et al.

    Returns:
        The error, in 0..1.

    Raises:
        InputError: probabilities, labels or bins are malformed.

    Example:
        >>> import numpy as np
        >>> probs = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6]])
        >>> round(maximum_calibration_error(probs, np.array([0, 0, 1, 0])), 3)
        0.6

    Reference:
        Naeini, Cooper, Hauskrecht, AAAI 2015.
    """
    checks.integer(bins, "bins", low=1)
    confidence, correct = top_label(probs, labels)
    sums = bin_sums(confidence[None], correct[None], bins)
    return float((sums.gap.abs() / sums.samples.clamp(min=1)).max())


class MaximumCalibrationError(ConfidenceBins):
    """`maximum_calibration_error` over batches; its state is two sums a bin.

    Example:
        >>> import torch
        >>> metric = MaximumCalibrationError(bins=10)
        >>> metric.update(torch.tensor([[0.75, 0.25], [0.25, 0.75]]), torch.tensor([0, 0]))
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    def compute(self) -> Tensor:
        """The error of all batches together."""
        return (self.gap.abs() / self.samples.clamp(min=1)).max()
