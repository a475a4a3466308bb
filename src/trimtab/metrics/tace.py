"""Thresholded adaptive calibration error: class-wise, over bins of equal mass, without the tiny probabilities.

With many classes nearly all of a class's probabilities are next to zero and right about it, and drown the rest in the
average. Reach for this one to see how the probabilities are calibrated that anyone would act on.

Nixon, Dusenberry, Zhang, Jerfel, Tran 2019, arXiv 1904.01685, who use thresholds of 0.001 to 0.1. In their terms
`classwise_calibration_error` is SCE and `classwise_calibration_error_equal_mass` ACE. Where bins cannot be equally
large (ties, a remainder), each counts by its samples.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from trimtab.core import checks
from trimtab.core.checks import InputError
from trimtab.core.threads import one_thread
from trimtab.metrics.binning import equal_count, expected_errors, gap_sums, rank
from trimtab.metrics.rows import Labels, Matrix, checked


def thresholded_adaptive_calibration_error(
    probs: Matrix, labels: Labels, bins: int = 15, threshold: float = 0.01
) -> float:
    """Mean over classes k of the sum over equal-mass bins of (n_b / n_k) |share of label k - mean p_k|.

    Only the n_k samples with p_k > threshold count for class k.

    Args:
        probs: probabilities (n, c), rows sum to one; tensor or array.
        labels: true classes (n,), integers in 0..c-1.
        bins: number of bins of each class's probabilities; 15 as in `expected_calibration_error`.
        threshold: only larger probabilities are looked at, >= 0 and below 1 / c; 0.01 is the middle of Nixon et al.'s.
            A class without any is left out of the mean.

    Returns:
        The error, in 0..1.

    Raises:
        InputError: an argument is malformed.

    Example:
        >>> import numpy as np
        >>> probs = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6]])
        >>> round(thresholded_adaptive_calibration_error(probs, np.array([0, 0, 1, 0]), bins=2, threshold=0.15), 3)
        0.258

    Reference:
        Nixon et al., arXiv 1904.01685.
    """
    metric = ThresholdedAdaptiveCalibrationError(bins, threshold)
    metric.update(probs, labels)
    return float(metric.compute())


class ThresholdedAdaptiveCalibrationError(Metric):
    """`thresholded_adaptive_calibration_error` over batches; its state is all probabilities, as quantiles need them.

    Example:
        >>> import torch
        >>> metric = ThresholdedAdaptiveCalibrationError(bins=2)
        >>> metric.update(torch.tensor([[0.75, 0.25], [0.25, 0.75]]), torch.tensor([0, 1]))
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    probs: list[Tensor]
    labels: list[Tensor]

    def __init__(self, bins: int = 15, threshold: float = 0.01, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.bins = checks.integer(bins, "bins", low=1)
        self.threshold = checks.number(threshold, "threshold", low=0, high=0.5, high_open=True)
        self.add_state("probs", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")

    def update(self, probs: Matrix, labels: Labels) -> None:
        """Add a batch: probabilities (n, c) and labels (n,)."""
        p, y = checked(probs, labels)
        if self.threshold >= 1 / p.shape[1]:
            raise InputError(f"threshold must lie below 1 / {p.shape[1]} for so many classes, got {self.threshold:g}")
        self.probs.append(p)
        self.labels.append(y)

    def compute(self) -> Tensor:
        """The error of all batches together."""
        return _error(dim_zero_cat(self.probs), dim_zero_cat(self.labels), self.bins, self.threshold)


@one_thread()
def _error(p: Float[Tensor, "n c"], y: Int[Tensor, " n"], bins: int, threshold: float) -> Float[Tensor, ""]:
    errors = []
    for k in range(p.shape[1]):
        kept = p[:, k] > threshold
        if bool(kept.any()):
            ranked = rank(p[kept, k][None], (y[kept] == k)[None])
            errors.append(expected_errors(gap_sums(ranked), equal_count(ranked, bins), [bins])[0, 0])
    return torch.stack(errors).mean()
