"""Expected calibration error: how far stated confidence is from accuracy, on average over equal-width bins.

The number that most papers report. Reach for it to compare with them, with 15 bins; for a number that depends on no
binning take `kolmogorov_smirnov_error`, and for a loss that a better model cannot make worse take the log loss.

Naeini, Cooper, Hauskrecht 2015, "Obtaining Well Calibrated Probabilities Using Bayesian Binning"; Guo et al. 2017,
arXiv 1706.04599. Bins are (lower, upper] as in Guo's code and in netcal, where torchmetrics takes [lower, upper): a
confidence of exactly 0.2 lies in the bin that ends there.
"""

from __future__ import annotations

from torch import Tensor

from trimtab.core import checks
from trimtab.metrics.binning import bin_sums
from trimtab.metrics.confidences import ConfidenceBins
from trimtab.metrics.rows import Labels, Matrix, top_label


def expected_calibration_error(probs: Matrix, labels: Labels, bins: int = 15) -> float:
    """Sum over bins of (n_b / n) |accuracy in the bin - mean confidence in the bin|.

    Args:
        probs: probabilities (n, c), rows sum to one; tensor or array.
        labels: true classes (n,), integers in 0..c-1.
        bins: equal-width bins of the confidence in 0..1; 15 as in Guo et al.

    Returns:
        The error, in 0..1.

    Raises:
        InputError: probabilities, labels or bins are malformed.

    Example:
        >>> import numpy as np
        >>> probs = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6]])
        >>> round(expected_calibration_error(probs, np.array([0, 0, 1, 0])), 3)
        0.3

    Reference:
        Naeini, Cooper, Hauskrecht, AAAI 2015; Guo et al., arXiv 1706.04599.
    """
    checks.integer(bins, "bins", low=1)
    confidence, correct = top_label(probs, labels)
    return float(bin_sums(confidence[None], correct[None], bins).gap.abs().sum() / len(confidence))


class ExpectedCalibrationError(ConfidenceBins):
    """`expected_calibration_error` over batches; its state is two sums a bin.

    Example:
        >>> import torch
        >>> metric = ExpectedCalibrationError(bins=10)
        >>> metric.update(torch.tensor([[0.75, 0.25], [0.25, 0.75]]), torch.tensor([0, 1]))
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    def compute(self) -> Tensor:
        """The error of all batches together."""
        return self.gap.abs().sum() / self.samples.sum()
