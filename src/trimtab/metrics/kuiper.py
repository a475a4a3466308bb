"""Kuiper calibration error: how far over- and underconfidence add up over a range of confidences.

Like `kolmogorov_smirnov_error` it needs no bins and no bandwidth: with the samples sorted by confidence, it is the
largest sum of (hit - confidence) over any run of neighbouring samples. Of the two it does not depend on where the run
begins, so that a model which is too shy below and too sure above is not let off by a cancellation.

Arrieta-Ibarra, Gujral, Tannen, Tygert, Xu 2022, arXiv 2205.09680. Tied confidences are one step, so that the order of
the rows is irrelevant.
"""

from __future__ import annotations

from torch import Tensor

from trimtab.metrics.binning import gap_sums, tie_ends
from trimtab.metrics.confidences import ConfidenceMetric
from trimtab.metrics.rows import Labels, Matrix


def kuiper_error(probs: Matrix, labels: Labels) -> float:
    """max over s < t of |(1/n) sum of (hit - confidence) over samples with s < confidence <= t|.

    Args:
        probs: probabilities (n, c), rows sum to one; tensor or array.
        labels: true classes (n,), integers in 0..c-1.

    Returns:
        The error, in 0..1, at least that of `kolmogorov_smirnov_error`.

    Raises:
        InputError: probabilities or labels are malformed.

    Example:
        >>> import numpy as np
        >>> probs = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6]])
        >>> round(kuiper_error(probs, np.array([0, 0, 1, 0])), 3)
        0.15

    Reference:
        Arrieta-Ibarra et al., Metrics of Calibration for Probabilistic Predictions, JMLR 2022, arXiv 2205.09680.
    """
    metric = KuiperError()
    metric.update(probs, labels)
    return float(metric.compute())


class KuiperError(ConfidenceMetric):
    """`kuiper_error` over batches; its state is all confidences.

    Example:
        >>> import torch
        >>> metric = KuiperError()
        >>> metric.update(torch.tensor([[0.75, 0.25], [0.25, 0.75]]), torch.tensor([0, 1]))
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    higher_is_better = False

    def compute(self) -> Tensor:
        """The error of all batches together."""
        ranked = self._ranked()
        sums = gap_sums(ranked)[0, tie_ends(ranked.values[0])]
        return (sums.amax().clamp(min=0) - sums.amin().clamp(max=0)) / ranked.n
