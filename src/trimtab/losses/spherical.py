"""Losses that see the scores only through the target's score, their sum and their sum of squares.

For very many classes: a layer that knows these three numbers without computing the scores
(`trimtab.nn.FactoredOutput`) trains in a time that does not depend on the number of classes. The Z-loss
(`trimtab.losses.ZLoss`) is the member of the family to reach for; these are its elders: the squared error to the
one-hot target, and two softmaxes whose exponential is replaced by a quadratic.

De Brébisson, Vincent (2016), arXiv 1511.05042 and 1604.08859. Every member is called as ``loss(logits, labels)``, and,
where the sums are known already, as ``loss.of_sums(target, squares, total, classes)``.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.core import checks
from trimtab.losses import base
from trimtab.losses.base import Reduction
from trimtab.losses.moments import sums


class _Spherical(nn.Module):
    """The two ways in; a member of the family says what its loss is."""

    def __init__(self, *, reduction: Reduction = "mean"):
        super().__init__()
        self.reduction = checks.one_of(reduction, "reduction", Reduction)

    def forward(self, logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"]) -> Float[Tensor, "..."]:
        """The loss of logits (n, c) at labels (n,)."""
        logits, labels = base.pair(logits, labels)
        return self.of_sums(*sums(logits, labels), logits.shape[1])

    def of_sums(
        self, target: Float[Tensor, " n"], squares: Float[Tensor, " n"], total: Float[Tensor, " n"], classes: int
    ) -> Float[Tensor, "..."]:
        """The loss of the targets' scores, the sums of squared scores and the sums of scores over all classes."""
        checks.finite(squares, "the sum of squared logits")
        return base.reduced(self._values(target, squares, total, classes), self.reduction)

    def _values(self, target: Tensor, squares: Tensor, total: Tensor, classes: int) -> Tensor:
        raise NotImplementedError


class SquaredErrorLoss(_Spherical):
    """The squared distance of the scores to the one-hot target, q - 2 o_c + 1.

    Args:
        reduction: ``"mean"`` over the batch, ``"sum"`` as in the authors' example, or ``"none"``.

    Raises:
        InputError: logits or labels are malformed, or so large that their squares overflow.

    Example:
        >>> import torch
        >>> SquaredErrorLoss()(torch.tensor([[0.5, 0.0, 1.0]]), torch.tensor([2]))
        tensor(0.2500)

    Reference:
        De Brébisson and Vincent, The Z-loss: a shift and scale invariant classification loss belonging to the
        Spherical Family, 2016.
    """

    def _values(self, target: Tensor, squares: Tensor, total: Tensor, classes: int) -> Tensor:
        return squares - 2 * target + 1


class TaylorSoftmaxLoss(_Spherical):
    """The log loss of the softmax whose exponential is its second Taylor polynomial, 1 + o + o^2 / 2.

    The polynomial is at least 1/2, so that the loss needs no guard; it has its minimum at o = -1, and scores far below
    that count as large ones do.

    Args:
        reduction: ``"mean"`` over the batch, ``"sum"`` as in the authors' example, or ``"none"``.

    Raises:
        InputError: logits or labels are malformed, or so large that their squares overflow.

    Example:
        >>> import torch
        >>> TaylorSoftmaxLoss()(torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([0])).exp()  # (5 + 1 + 0.5) / 5
        tensor(1.3000)

    Reference:
        De Brébisson and Vincent, An Exploration of Softmax Alternatives Belonging to the Spherical Loss Family, 2016.
    """

    def _values(self, target: Tensor, squares: Tensor, total: Tensor, classes: int) -> Tensor:
        return (classes + total + squares / 2).log() - (1 + target + target.square() / 2).log()


class SphericalSoftmaxLoss(_Spherical):
    """The log loss of the softmax whose exponential is a square, (o^2 + eps) / (q + c eps).

    It does not see the scores' signs; but for eps it does not see their scale either.

    Args:
        eps: what is added to every square, > 0; the gradient is at most 1 / sqrt(eps). The default is ours.
        reduction: ``"mean"`` over the batch, ``"sum"`` as in the authors' example, or ``"none"``.

    Raises:
        InputError: eps is not positive; logits or labels are malformed, or so large that their squares overflow.

    Example:
        >>> import torch
        >>> SphericalSoftmaxLoss()(torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([0])).neg().exp()  # 9 of 10
        tensor(0.9000)

    Reference:
        De Brébisson and Vincent, An Exploration of Softmax Alternatives Belonging to the Spherical Loss Family, 2016.
    """

    def __init__(self, *, eps: float = 1e-6, reduction: Reduction = "mean"):
        super().__init__(reduction=reduction)
        self.eps = checks.number(eps, "eps", low=0, low_open=True)

    def _values(self, target: Tensor, squares: Tensor, total: Tensor, classes: int) -> Tensor:
        return (squares + classes * self.eps).log() - (target.square() + self.eps).log()
