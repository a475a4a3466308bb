"""Prediction intervals: how often they hold the target (PICP), and how wide they are (MPIW).

Read the two together: coverage is what an interval promises, width is what it costs, and either alone is easy to have.
Any intervals will do: mean ± z std, two quantiles, conformal ones.

Khosravi, Nahavandi, Creighton, Atiya 2011, "Lower Upper Bound Estimation Method for Construction of Neural
Network-Based Prediction Intervals" (the names); Kuleshov, Fenner, Ermon 2018, arXiv 1807.00263. Ends belong to the
interval. netcal's PICP makes the intervals from a Gaussian itself; here they are given.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from trimtab.core import checks
from trimtab.core.checks import InputError
from trimtab.metrics.regression import Values, vector
from trimtab.metrics.sums import MeanMetric


def interval_coverage(lower: Values, upper: Values, targets: Values) -> float:
    """Share of the targets with lower <= target <= upper: the prediction interval coverage probability, PICP.

    Args:
        lower: lower ends (n,), in the units of the targets; tensor or array.
        upper: upper ends (n,), nowhere below `lower`.
        targets: what came (n,).

    Returns:
        The share, in 0..1; the intervals' stated probability is what it should be.

    Raises:
        InputError: an argument is malformed.

    Example:
        >>> import numpy as np
        >>> interval_coverage(np.array([0.0, 0.0]), np.array([1.0, 2.0]), np.array([1.0, 3.0]))
        0.5

    Reference:
        Khosravi et al., IEEE Transactions on Neural Networks 2011.
    """
    metric = IntervalCoverage()
    metric.update(lower, upper, targets)
    return float(metric.compute())


def interval_width(lower: Values, upper: Values) -> float:
    """Mean of upper - lower: the mean prediction interval width, MPIW.

    Args:
        lower: lower ends (n,), in the units of the targets; tensor or array.
        upper: upper ends (n,), nowhere below `lower`.

    Returns:
        The width, at least 0, in the units of the targets; narrower is better at equal coverage.

    Raises:
        InputError: an argument is malformed.

    Example:
        >>> import numpy as np
        >>> interval_width(np.array([0.0, 0.0]), np.array([1.0, 2.0]))
        1.5

    Reference:
        Khosravi et al., IEEE Transactions on Neural Networks 2011.
    """
    metric = IntervalWidth()
    metric.update(lower, upper)
    return float(metric.compute())


def _checked(lower: Any, upper: Any) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    low = vector(lower, "lower")
    high = vector(upper, "upper", len(low)).to(low.device)
    if bool((high < low).any()):
        raise InputError(f"upper must not lie below lower, it does at {checks.first_bad(high < low)}")
    return low, high


class IntervalCoverage(MeanMetric):
    """`interval_coverage` over batches; its state is one sum.

    Example:
        >>> import torch
        >>> metric = IntervalCoverage()
        >>> metric.update(torch.zeros(2), torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    def update(self, lower: Values, upper: Values, targets: Values) -> None:
        """Add a batch: the intervals' ends and what came, each (n,)."""
        low, high = _checked(lower, upper)
        y = vector(targets, "targets", len(low)).to(low.device)
        self._add((low <= y) & (y <= high))


class IntervalWidth(MeanMetric):
    """`interval_width` over batches; its state is one sum.

    Example:
        >>> import torch
        >>> metric = IntervalWidth()
        >>> metric.update(torch.zeros(2), torch.tensor([1.0, 2.0]))
        >>> metric.compute()
        tensor(1.5000, dtype=torch.float64)
    """

    higher_is_better = False

    def update(self, lower: Values, upper: Values) -> None:
        """Add a batch: the intervals' ends, each (n,)."""
        low, high = _checked(lower, upper)
        self._add(high - low)
