"""Sets of classes, as conformal prediction makes them: how often they hold the label, and how large they are.

Coverage is the promise, size the price. A promise kept on average can be broken where it matters: coverage by size of
the set shows whether the hard samples, whose sets should be large, are covered as the easy ones are.

Angelopoulos, Bates, Malik, Jordan 2021, arXiv 2009.14193 (size-stratified coverage); the smallest of the strata's
coverages is MAPIE's `classification_ssc_score`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trimtab.core import checks
from trimtab.core.checks import InputError
from trimtab.metrics.rows import Labels
from trimtab.metrics.sums import MeanMetric, SumMetric

Sets = Bool[Tensor, "n c"] | Bool[np.ndarray, "n c"]


class SizeStrata(NamedTuple):
    """Sizes that occur, in ascending order, how many sets have each, and the share of these that hold the label."""

    size: Int[Tensor, " sizes"]
    sets: Int[Tensor, " sizes"]
    coverage: Float[Tensor, " sizes"]


def coverage(sets: Sets, labels: Labels) -> float:
    """Share of the sets that hold the label.

    Args:
        sets: which classes are in (n, c), booleans; tensor or array.
        labels: true classes (n,), integers in 0..c-1.

    Returns:
        The share, in 0..1; at least 1 - alpha is what a conformal set promises, on average over calibration sets.

    Raises:
        InputError: an argument is malformed.

    Example:
        >>> import numpy as np
        >>> coverage(np.array([[True, True], [False, True]]), np.array([0, 0]))
        0.5

    Reference:
        Angelopoulos et al., ICLR 2021, arXiv 2009.14193.
    """
    metric = Coverage()
    metric.update(sets, labels)
    return float(metric.compute())


def set_size(sets: Sets) -> float:
    """Mean number of classes in a set.

    Args:
        sets: which classes are in (n, c), booleans; tensor or array.

    Returns:
        The size, in 0..c; smaller is better at equal coverage.

    Raises:
        InputError: `sets` is malformed.

    Example:
        >>> import numpy as np
        >>> set_size(np.array([[True, True], [False, True]]))
        1.5

    Reference:
        Angelopoulos et al., ICLR 2021, arXiv 2009.14193.
    """
    metric = SetSize()
    metric.update(sets)
    return float(metric.compute())


def size_stratified_coverage(sets: Sets, labels: Labels) -> SizeStrata:
    """Coverage among the sets of each size.

    Args:
        sets: which classes are in (n, c), booleans; tensor or array.
        labels: true classes (n,), integers in 0..c-1.

    Raises:
        InputError: an argument is malformed.

    Example:
        >>> import numpy as np
        >>> sets = np.array([[True, True], [False, True], [True, False]])
        >>> strata = size_stratified_coverage(sets, np.array([0, 0, 0]))
        >>> strata.size.tolist(), strata.coverage.tolist()
        ([1, 2], [0.5, 1.0])

    Reference:
        Angelopoulos et al., ICLR 2021, arXiv 2009.14193.
    """
    s, y = _checked(sets, labels)
    return _strata(*_counts(s, y))


def _checked_sets(sets: Any) -> Bool[Tensor, "n c"]:
    s = checks.tensor(sets, "sets")
    if s.ndim != 2 or s.dtype != torch.bool or s.numel() == 0:
        raise InputError(f"sets must be booleans of shape (n, c), n and c >= 1, got {s.dtype} {tuple(s.shape)}")
    return s


def _checked(sets: Any, labels: Any) -> tuple[Bool[Tensor, "n c"], Int[Tensor, " n"]]:
    s = _checked_sets(sets)
    return s, checks.labels(labels, *s.shape).to(s.device)


def _counts(sets: Bool[Tensor, "n c"], labels: Int[Tensor, " n"]) -> tuple[Tensor, Tensor]:
    """How many sets of each size 0..c there are, and how many of these hold the label."""
    size, hit = sets.sum(1), sets.gather(1, labels[:, None])[:, 0]
    sizes = sets.shape[1] + 1
    return torch.bincount(size, minlength=sizes), torch.bincount(size[hit], minlength=sizes)


def _strata(count: Tensor, covered: Tensor) -> SizeStrata:
    size = count.nonzero()[:, 0]
    return SizeStrata(size, count[size].long(), covered[size].double() / count[size])


class Coverage(MeanMetric):
    """`coverage` over batches; its state is one sum.

    Example:
        >>> import torch
        >>> metric = Coverage()
        >>> metric.update(torch.tensor([[True, True], [False, True]]), torch.tensor([0, 0]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better = True

    def update(self, sets: Sets, labels: Labels) -> None:
        """Add a batch: sets (n, c) and labels (n,)."""
        s, y = _checked(sets, labels)
        self._add(s.gather(1, y[:, None]))


class SetSize(MeanMetric):
    """`set_size` over batches; its state is one sum.

    Example:
        >>> import torch
        >>> metric = SetSize()
        >>> metric.update(torch.tensor([[True, True], [False, True]]))
        >>> metric.compute()
        tensor(1.5000, dtype=torch.float64)
    """

    higher_is_better = False

    def update(self, sets: Sets) -> None:
        """Add a batch: sets (n, c)."""
        self._add(_checked_sets(sets).sum(1))


class SizeStratifiedCoverage(SumMetric):
    """`size_stratified_coverage` over batches; its state is two counts a size.

    Args:
        num_classes: c.

    Example:
        >>> import torch
        >>> metric = SizeStratifiedCoverage(num_classes=2)
        >>> metric.update(torch.tensor([[True, True], [False, True]]), torch.tensor([0, 0]))
        >>> metric.compute().coverage.tolist()
        [0.0, 1.0]
    """

    count: Tensor
    covered: Tensor

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_classes = checks.integer(num_classes, "num_classes", low=1)
        self._sum(count=num_classes + 1, covered=num_classes + 1)

    def update(self, sets: Sets, labels: Labels) -> None:
        """Add a batch: sets (n, c) and labels (n,)."""
        s, y = _checked(sets, labels)
        if s.shape[1] != self.num_classes:
            raise InputError(f"sets must have {self.num_classes} columns, got {s.shape[1]}")
        count, covered = _counts(s, y)
        self.count += count
        self.covered += covered

    def compute(self) -> SizeStrata:
        """The strata of all batches together."""
        return _strata(self.count, self.covered)
