"""Class-wise calibration error over bins of equal mass, made for each class from its own probabilities.

Most probabilities of a class are near zero, and equal-width bins put nearly all of them into the first. Reach for this
variant where there are more than a few classes.

Nixon et al. 2019, arXiv 1904.01685 ("adaptive calibration error"). The edges are those of
`expected_calibration_error_equal_mass`; as there, the smallest probability of a class is in no bin unless
`include_lowest`. No public code of the benchmark's authors computes this measure: the definition is the natural one.
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
from trimtab.metrics.binning import equal_mass, expected_errors, gap_sums, rank
from trimtab.metrics.rows import Labels, Matrix, checked, columns


def classwise_calibration_error_equal_mass(
    probs: Matrix, labels: Labels, bins: int = 15, *, classes: int | None = None, include_lowest: bool = False
) -> float:
    """Mean over classes k of the sum over equal-mass bins of (n_b / n) |share of label k - mean p_k|.

    Args:
        probs: probabilities (n, c), rows sum to one; tensor or array.
        labels: true classes (n,), integers in 0..c-1.
        bins: number of bins of each class's probability.
        classes: average over the first so many classes; None for all c.
        include_lowest: count the smallest probability in the first bin.

    Returns:
        The error, in 0..1.

    Raises:
        InputError: an argument is malformed.

    Example:
        >>> import numpy as np
        >>> probs = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6]])
        >>> round(classwise_calibration_error_equal_mass(probs, np.array([0, 0, 1, 0]), bins=2), 3)
        0.25

    Reference:
        Nixon et al., arXiv 1904.01685.
    """
    checks.integer(bins, "bins", low=1)
    p, y = checked(probs, labels)
    kept = p.shape[1] if classes is None else checks.integer(classes, "classes", low=1, high=p.shape[1])
    return float(_errors(p, y, bins, include_lowest)[:kept].mean())


@one_thread()
def _errors(p: Float[Tensor, "n c"], y: Int[Tensor, " n"], bins: int, include_lowest: bool) -> Float[Tensor, " c"]:
    """The error of every class."""
    errors = []
    for first, group in columns(p):
        ranked = rank(group, y == torch.arange(first, first + len(group), device=y.device)[:, None])
        places = equal_mass(ranked, None, [bins], include_lowest=include_lowest)
        errors.append(expected_errors(gap_sums(ranked), places, [bins])[:, 0])
    return torch.cat(errors)


class ClasswiseCalibrationErrorEqualMass(Metric):
    """`classwise_calibration_error_equal_mass` over batches; its state is all probabilities, as quantiles need them.

    Args:
        num_classes: c.
        bins: number of bins.
        classes: average over the first so many classes; None for all.
        include_lowest: count the smallest probability in the first bin.

    Example:
        >>> import torch
        >>> metric = ClasswiseCalibrationErrorEqualMass(num_classes=2, bins=2)
        >>> metric.update(torch.tensor([[0.75, 0.25], [0.25, 0.75]]), torch.tensor([0, 1]))
        >>> metric.compute()
        tensor(0.1250, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    probs: list[Tensor]
    labels: list[Tensor]

    def __init__(
        self,
        num_classes: int,
        bins: int = 15,
        *,
        classes: int | None = None,
        include_lowest: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_classes = checks.integer(num_classes, "num_classes", low=2)
        self.bins = checks.integer(bins, "bins", low=1)
        self.classes = num_classes if classes is None else checks.integer(classes, "classes", low=1, high=num_classes)
        self.include_lowest = include_lowest
        self.add_state("probs", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")

    def update(self, probs: Matrix, labels: Labels) -> None:
        """Add a batch: probabilities (n, c) and labels (n,)."""
        p, y = checked(probs, labels)
        if p.shape[1] != self.num_classes:
            raise InputError(f"probs must have {self.num_classes} columns, got {p.shape[1]}")
        self.probs.append(p)
        self.labels.append(y)

    def compute(self) -> Tensor:
        """The error of all batches together."""
        errors = _errors(dim_zero_cat(self.probs), dim_zero_cat(self.labels), self.bins, self.include_lowest)
        return errors[: self.classes].mean()
