"""Platt scaling: a sigmoid over the score, with a slope and a shift.

The classic for two classes and few samples, and for scores that are no log-odds at all, such as margins. With more
classes every class is calibrated against the rest and the answers are divided by their sum.

Platt (1999), Probabilistic Outputs for Support Vector Machines. As in the paper, the targets are smoothed to
(n1 + 1) / (n1 + 2) and 1 / (n0 + 2), which keeps the optimum finite on separable data. The score is the log-odds of the
class against the rest, so that a constant added to a row of logits changes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.calibration import one_vs_rest
from trimtab.calibration.base import Calibrator


class PlattScaling(Calibrator):
    """sigmoid(slope * s + bias) of each class's log-odds s, fitted by maximum likelihood to smoothed targets.

    Args:
        smoothing: use Platt's smoothed targets instead of 0 and 1. Without them separable data drive the slope up
            until the log loss is zero to twelve digits.

    Attributes:
        slope, bias: (k,), one for every binary problem: k = 1 for two classes (class 1 against class 0), else c.

    Example:
        >>> import torch
        >>> from trimtab.calibration import PlattScaling
        >>> generator = torch.Generator().manual_seed(0)
        >>> margin = 3 * torch.randn(4000, generator=generator)
        >>> labels = torch.bernoulli((0.5 * margin + 1).sigmoid(), generator=generator).long()
        >>> calibrator = PlattScaling().fit(torch.stack([-margin / 2, margin / 2], 1), labels)
        >>> [round(float(x), 1) for x in (calibrator.slope, calibrator.bias)]
        [0.5, 1.0]

    Reference:
        Platt, Probabilistic Outputs for Support Vector Machines and Comparisons to Regularized Likelihood Methods,
        Advances in Large Margin Classifiers, 1999.
    """

    slope: Tensor
    bias: Tensor

    def __init__(self, *, smoothing: bool = True) -> None:
        super().__init__()
        self.smoothing = smoothing
        self._declare("slope", "bias")

    def _fit(self, logits: Tensor, labels: Tensor, weights: Tensor | None) -> None:
        outcomes = one_vs_rest.outcomes(labels, logits.shape[1])
        if self.smoothing:
            ones = outcomes.sum(0) if weights is None else weights.double() @ outcomes
            zeros = (len(outcomes) if weights is None else weights.double().sum()) - ones
            outcomes = torch.where(outcomes == 1, (ones + 1) / (ones + 2), 1 / (zeros + 2))
        found = one_vs_rest.fit_logistic([one_vs_rest.log_odds(logits)], outcomes, weights)
        self._store(logits, slope=found[:, 0], bias=found[:, 1])

    def _log_probs(self, logits: Tensor) -> Tensor:
        odds = one_vs_rest.log_odds(logits) * self.slope.to(logits.dtype) + self.bias.to(logits.dtype)
        return one_vs_rest.from_log_odds(odds)
