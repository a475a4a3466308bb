"""Kolmogorov-Smirnov calibration error: the largest distance between summed confidence and summed accuracy.

No bins and no bandwidth: with the samples sorted by confidence, the running mean of the confidences should follow the
running mean of the hits. Reach for it where one number without a tuning choice is wanted.

Gupta et al. 2021, arXiv 2006.12800, "Calibration of Neural Networks using Splines". Their code steps through tied
confidences in the order in which they come; here a tied group is one step, so that the order of the rows is irrelevant.
"""

from __future__ import annotations

from torch import Tensor

from trimtab.metrics.binning import gap_sums, largest_partial_sum, last_of_ties
from trimtab.metrics.confidences import ConfidenceMetric
from trimtab.metrics.rows import Labels, Matrix


def kolmogorov_smirnov_error(probs: Matrix, labels: Labels) -> float:
    """max over t of |(1/n) sum of (hit - confidence) over samples with confidence <= t|.

    Args:
        probs: probabilities (n, c), rows sum to one; tensor or array.
        labels: true classes (n,), integers in 0..c-1.

    Returns:
        The error, in 0..1.

    Raises:
        InputError: probabilities or labels are malformed.

    Example:
        >>> import numpy as np
        >>> probs = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6]])
        >>> round(kolmogorov_smirnov_error(probs, np.array([0, 0, 1, 0])), 3)
        0.15

    Reference:
        Gupta et al., arXiv 2006.12800.
    """
    metric = KolmogorovSmirnovError()
    metric.update(probs, labels)
    return float(metric.compute())


class KolmogorovSmirnovError(ConfidenceMetric):
    """`kolmogorov_smirnov_error` over batches; its state is all confidences.

    Example:
        >>> import torch
        >>> metric = KolmogorovSmirnovError()
        >>> metric.update(torch.tensor([[0.75, 0.25], [0.25, 0.75]]), torch.tensor([0, 1]))
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    higher_is_better = False

    def compute(self) -> Tensor:
        """The error of all batches together."""
        ranked = self._ranked()
        return largest_partial_sum(gap_sums(ranked), last_of_ties(ranked.values[0]))[0]
