"""Negative log-likelihood, or log loss: how surprised the model is by the truth.

The loss that most classifiers are trained with and the one to choose a calibrator by: it is proper, so that only the
true probabilities minimise it, and no bin or bandwidth enters. It has no upper bound: one confident mistake can
dominate it.
"""

from __future__ import annotations

from torch import Tensor

from trimtab.metrics.rows import Labels, Matrix, checked
from trimtab.metrics.sums import MeanMetric


def negative_log_likelihood(probs: Matrix, labels: Labels) -> float:
    """Mean of -log(probability of the label).

    From logits, `calibration_suite` and `torch.nn.functional.cross_entropy` keep more of the precision.

    Args:
        probs: probabilities (n, c), rows sum to one; tensor or array.
        labels: true classes (n,), integers in 0..c-1.

    Returns:
        The loss in nats, at least 0; infinite if a label has probability 0.

    Raises:
        InputError: probabilities or labels are malformed.

    Example:
        >>> import numpy as np
        >>> round(negative_log_likelihood(np.array([[0.5, 0.5], [0.25, 0.75]]), np.array([0, 0])), 4)
        1.0397
    """
    p, y = checked(probs, labels)
    return float(_losses(p, y).mean())


def _losses(p: Tensor, y: Tensor) -> Tensor:
    return -p.gather(1, y[:, None])[:, 0].double().log()


class NegativeLogLikelihood(MeanMetric):
    """`negative_log_likelihood` over batches; its state is one sum.

    Example:
        >>> import torch
        >>> metric = NegativeLogLikelihood()
        >>> metric.update(torch.tensor([[0.5, 0.5], [0.25, 0.75]]), torch.tensor([0, 0]))
        >>> metric.compute()
        tensor(1.0397, dtype=torch.float64)
    """

    higher_is_better = False

    def update(self, probs: Matrix, labels: Labels) -> None:
        """Add a batch: probabilities (n, c) and labels (n,)."""
        self._add(_losses(*checked(probs, labels)))
