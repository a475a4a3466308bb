"""Pinball loss, or quantile loss: what a predicted quantile costs, too low and too high weighed as the level asks.

The proper score of quantiles: only the true quantile of level q minimises its mean. Reach for it to compare quantile
regressions, and intervals by their two ends; averaged over many levels it approaches half the continuous ranked
probability score.

Koenker, Bassett 1978, "Regression Quantiles", Econometrica; as in scikit-learn's `mean_pinball_loss`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from trimtab.core import checks
from trimtab.metrics.regression import Values, open_levels, vector
from trimtab.metrics.sums import MeanMetric

Quantiles = Float[Tensor, "n q"] | Float[np.ndarray, "n q"]


def pinball_loss(quantiles: Quantiles, targets: Values, levels: Sequence[float]) -> float:
    """Mean over samples and levels q of max(q e, (q - 1) e), e = target - predicted quantile.

    Args:
        quantiles: predicted quantiles (n, q), a column a level, in the units of the targets; tensor or array.
        targets: what came (n,).
        levels: the columns' probabilities, in (0, 1).

    Returns:
        The loss, at least 0, in the units of the targets.

    Raises:
        InputError: an argument is malformed.

    Example:
        >>> import numpy as np
        >>> pinball_loss(np.array([[1.0, 3.0], [2.0, 4.0]]), np.array([2.0, 5.0]), [0.25, 0.75])
        0.5

    Reference:
        Koenker, Bassett, Econometrica 1978.
    """
    metric = PinballLoss(levels)
    metric.update(quantiles, targets)
    return float(metric.compute())


class PinballLoss(MeanMetric):
    """`pinball_loss` over batches; its state is one sum.

    Example:
        >>> import torch
        >>> metric = PinballLoss([0.5])
        >>> metric.update(torch.tensor([[1.0], [2.0]]), torch.tensor([2.0, 5.0]))
        >>> metric.compute()
        tensor(1., dtype=torch.float64)
    """

    higher_is_better = False

    def __init__(self, levels: Sequence[float], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.levels = open_levels(levels)

    def update(self, quantiles: Quantiles, targets: Values) -> None:
        """Add a batch: predicted quantiles (n, q) and what came (n,)."""
        predicted = checks.matrix(quantiles, "quantiles", columns=len(self.levels)).detach().double()
        error = vector(targets, "targets", len(predicted)).to(predicted.device)[:, None] - predicted
        self._add((error * error.new_tensor(self.levels)).maximum(error * (error.new_tensor(self.levels) - 1)))
