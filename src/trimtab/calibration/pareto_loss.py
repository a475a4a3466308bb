"""The loss of Pareto self-supervision: one number from the losses of several sources that may abstain.

For networks that learn from rules, keywords or other models in place of labels;
`trimtab.calibration.ParetoSelfSupervision` trains one, with everything around it.

Zhao, Wei, Preston, Poon (2023), arXiv 2306.16564. The authors' code (microsoft/POLAR) is followed: weights are not
renormalised over the sources that voted, and with a single source the loss is the sum over the batch.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.calibration.scalarisers import Scalarizer, Weights, scalarised, source_labels
from trimtab.core import checks
from trimtab.core.checks import InputError


class ParetoLoss(nn.Module):
    """One number from the losses of several sources, such that its minimum is Pareto-optimal between them.

    With l_j the cross-entropy against source j's label, where it gave one, and w_j its weight, a sample's loss is

    - ``"linear"``: the sum of w_j l_j,
    - ``"square"``: the square of that sum,
    - ``"2-norm"``: the root of the sum of (w_j l_j)^2,
    - ``"max"``: the largest w_j l_j;

    averaged over the samples with a label. Zero where there is none.

    Args:
        scalarizer: one of the four.
        weights: (m,), >= 0, one a source; 1/m each if None, as the authors do. Not renormalised over the sources that
            voted.

    Raises:
        InputError: the scalarizer is unknown, or weights are negative or of another number than the sources.

    Example:
        >>> import torch
        >>> from trimtab.calibration import ParetoLoss
        >>> logits = torch.zeros(2, 3)
        >>> weak_labels = torch.tensor([[0, 1], [2, -1]])  # the second source abstains on the second sample
        >>> for scalarizer in ("linear", "square", "2-norm", "max"):
        ...     print(scalarizer, round(float(ParetoLoss(scalarizer)(logits, weak_labels)), 3))
        linear 0.824
        square 0.754
        2-norm 0.663
        max 0.549

    Reference:
        Zhao et al., Pareto Optimal Learning for Estimating Large Language Model Errors, ACL 2024.
    """

    weights: Tensor | None

    def __init__(self, scalarizer: Scalarizer = "linear", weights: Weights | None = None) -> None:
        super().__init__()
        self.scalarizer = checks.one_of(scalarizer, "scalarizer", Scalarizer)
        self.register_buffer("weights", None if weights is None else checks.weights(weights, len(weights)).double())

    def forward(self, logits: Float[Tensor, "n c"], weak_labels: Int[Tensor, "n m"]) -> Float[Tensor, ""]:
        """The loss of a batch.

        Args:
            logits: (n, c), or (n, 1) for two classes: the log-odds of class 1.
            weak_labels: (n, m) classes, -1 where a source abstains.
        """
        labels = source_labels(weak_labels, len(logits), max(2, logits.shape[1])).to(logits.device)
        if self.weights is not None and labels.shape[1] not in (1, len(self.weights)):
            raise InputError(f"weak_labels must have {len(self.weights)} columns as weights, got {labels.shape[1]}")
        return scalarised(logits, labels, self.scalarizer, self.weights)
