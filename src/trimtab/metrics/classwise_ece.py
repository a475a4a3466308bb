"""Class-wise calibration error: ECE of every class's probability, averaged over the classes.

ECE looks at the largest probability only. Reach for this one where all probabilities are used: costs that differ by
class, top-k lists, thresholds on a single class. With many classes most probabilities are near zero and so is the mean.

Kull et al. 2019, arXiv 1910.12656 ("static" or class-wise ECE); Nixon et al. 2019, arXiv 1904.01685. The benchmark
authors' package averages over max(label) + 1 classes, and so over fewer where the last classes do not occur; here over
all classes unless `classes` says otherwise. A probability of exactly 0, which falls in no bin there, is in the first
bin here.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.core import checks
from trimtab.core.checks import InputError
from trimtab.metrics.binning import bin_sums
from trimtab.metrics.rows import Labels, Matrix, checked, columns
from trimtab.metrics.sums import SumMetric


def classwise_calibration_error(probs: Matrix, labels: Labels, bins: int = 15, *, classes: int | None = None) -> float:
    """Mean over classes k of the sum over bins of (n_b / n) |share of label k - mean p_k|.

    Args:
        probs: probabilities (n, c), rows sum to one; tensor or array.
        labels: true classes (n,), integers in 0..c-1.
        bins: equal-width bins (lower, upper] of each class's probability in 0..1; 15 as in Kull et al.
        classes: average over the first so many classes; None for all c. The authors' package takes max(label) + 1.

    Returns:
        The error, in 0..1.

    Raises:
        InputError: an argument is malformed.

    Example:
        >>> import numpy as np
        >>> probs = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6]])
        >>> round(classwise_calibration_error(probs, np.array([0, 0, 1, 0])), 3)
        0.3

    Reference:
        Kull et al., arXiv 1910.12656.
    """
    checks.integer(bins, "bins", low=1)
    p, y = checked(probs, labels)
    kept = p.shape[1] if classes is None else checks.integer(classes, "classes", low=1, high=p.shape[1])
    return float(_gaps(p, y, bins)[:kept].abs().sum(1).mean() / len(p))


def _gaps(p: Float[Tensor, "n c"], y: Int[Tensor, " n"], bins: int) -> Float[Tensor, "c bins"]:
    """Sum of hit - probability in every bin of every class."""
    gaps = []
    for first, group in columns(p):
        hits = y == torch.arange(first, first + len(group), device=y.device)[:, None]
        gaps.append(bin_sums(group, hits, bins).gap)
    return torch.cat(gaps)


class ClasswiseCalibrationError(SumMetric):
    """`classwise_calibration_error` over batches; its state is one sum a class and bin.

    Args:
        num_classes: c.
        bins: equal-width bins.
        classes: average over the first so many classes; None for all.

    Example:
        >>> import torch
        >>> metric = ClasswiseCalibrationError(num_classes=2, bins=10)
        >>> metric.update(torch.tensor([[0.75, 0.25], [0.25, 0.75]]), torch.tensor([0, 1]))
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    higher_is_better = False
    gap: Tensor
    samples: Tensor

    def __init__(self, num_classes: int, bins: int = 15, *, classes: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_classes = checks.integer(num_classes, "num_classes", low=2)
        self.bins = checks.integer(bins, "bins", low=1)
        self.classes = num_classes if classes is None else checks.integer(classes, "classes", low=1, high=num_classes)
        self._sum(gap=(num_classes, bins), samples=1)

    def update(self, probs: Matrix, labels: Labels) -> None:
        """Add a batch: probabilities (n, c) and labels (n,)."""
        p, y = checked(probs, labels)
        if p.shape[1] != self.num_classes:
            raise InputError(f"probs must have {self.num_classes} columns, got {p.shape[1]}")
        self.gap += _gaps(p, y, self.bins)
        self.samples += len(p)

    def compute(self) -> Tensor:
        """The error of all batches together."""
        return self.gap[: self.classes].abs().sum(1).mean() / self.samples[0]
