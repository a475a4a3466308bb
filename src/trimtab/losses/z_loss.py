"""Z-loss: a classification loss of the target's z-score among all scores of its row.

For very many classes that are ranked (top-k): the loss sees the scores only through the target's score, their sum and
their sum of squares, so that `trimtab.nn.FactoredOutput` trains the output layer in a time that does not depend on the
number of classes; and a and b tune it to the k that counts. It gives no probabilities: calibrate afterwards where
some are needed. It is not the "z-loss" of PaLM and T5, which is the square of a log partition function.

De Brébisson, Vincent (2016), arXiv 1604.08859; code pascal20100/factored_output_layer, whose example has a = 1, b = 0
and a sum over the batch. The mean is the default here. What to know:

- The loss does not change when a row is shifted, or multiplied by a positive number: nothing holds the scores' size,
  and the gradient shrinks as it grows. Weight decay does what the loss does not.
- What we found (next token of Python source, 500 classes, five seeds): the top-1 error is 58 % with a = 0.2 and b = 10,
  64 % with the Taylor softmax, 80 % with the squared error, 57 % with the softmax's log loss. In top-50 it is 14.9 %
  with a = 1 and b = 0, 15.3 % with the log loss, 16.9 % with a = 0.2 and b = 10. Of the paper's "better than the log
  loss for certain k" little more than a tie is left: in four seeds of five in top-5, in three in top-50.
- z is at most sqrt(c - 1): with a larger b the target is pushed up for ever.
- A row whose scores are all equal has no z-scores. The formula's gradient there is 1 / eps = 1e12; here such a row has
  z = 0 and no gradient, and a warning says so. Output weights must therefore not start at zero.
- Of two scores the z-scores are 1 and -1: there is no gradient, so two classes are refused.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.core import checks
from trimtab.core.checks import InputError
from trimtab.losses import base
from trimtab.losses.base import Reduction
from trimtab.losses.moments import moments


class ZLoss(nn.Module):
    """softplus(a (b - z)) / a, where z = (o_c - mean) / (sd + eps) is the z-score of the target's score.

    Args:
        a: how sharply the loss turns from its slope to zero, > 0; a large one is the hinge max(0, b - z). 1 as in the
            authors' example; they tune it.
        b: the z-score up to which the target is pushed. 0 as in the authors' example; they tune it. With 500 classes,
            a = 0.2 and b = 10 had the best top-1, a = 1 and b = 0 the best top-50.
        eps: what is added to the standard deviation, > 0; 1e-12 as in the authors' code.
        reduction: ``"mean"`` over the batch, ``"sum"`` as in the authors' example, or ``"none"``.

    Raises:
        InputError: a or eps is not positive; logits or labels are malformed, of two classes, or so large that their
            squares overflow.

    Example:
        >>> import torch
        >>> logits, labels = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0]]), torch.tensor([0, 2])
        >>> loss = ZLoss()
        >>> loss(logits, labels), loss(3 * logits - 7, labels)
        (tensor(0.5466), tensor(0.5466))

    Reference:
        De Brébisson and Vincent, The Z-loss: a shift and scale invariant classification loss belonging to the
        Spherical Family, 2016.
    """

    def __init__(self, *, a: float = 1.0, b: float = 0.0, eps: float = 1e-12, reduction: Reduction = "mean"):
        super().__init__()
        self.a = checks.number(a, "a", low=0, low_open=True)
        self.b = checks.number(b, "b")
        self.eps = checks.number(eps, "eps", low=0, low_open=True)
        self.reduction = checks.one_of(reduction, "reduction", Reduction)

    def forward(self, logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"]) -> Float[Tensor, "..."]:
        """The loss of logits (n, c) at labels (n,)."""
        logits, labels = base.pair(logits, labels)
        _enough(logits.shape[1])
        target, mean, variance = moments(logits, labels)
        rounding = (4 * torch.finfo(mean.dtype).eps * mean).square()
        return self._of_moments(target, mean, variance, rounding)

    def of_sums(
        self, target: Float[Tensor, " n"], squares: Float[Tensor, " n"], total: Float[Tensor, " n"], classes: int
    ) -> Float[Tensor, "..."]:
        """The loss of the targets' scores, the sums of squared scores and the sums of scores over all classes.

        The variance is a difference of these sums, and loses the digits by which the mean exceeds the spread.
        """
        _enough(classes)
        mean = total / classes
        variance = (squares / classes - mean.square()).clamp_min(0)
        rounding = 4 * torch.finfo(mean.dtype).eps * mean.square()
        return self._of_moments(target, mean, variance, rounding)

    def _of_moments(self, target: Tensor, mean: Tensor, variance: Tensor, rounding: Tensor) -> Tensor:
        checks.finite(variance, "the variance of the logits")
        flat = variance <= rounding
        if not checks.unread(flat) and bool(flat.any()):
            warnings.warn(f"logits have no spread at {checks.first_bad(flat)}: no gradient there", stacklevel=3)
        # an infinite scale: z is 0, and so is every gradient through it
        scale = torch.where(flat, torch.inf, variance).sqrt() + self.eps
        z = (target - mean) / scale
        return base.reduced(F.softplus(self.b - z, beta=self.a, threshold=40), self.reduction)


def _enough(classes: int) -> None:
    if classes < 3:
        raise InputError(
            f"classes must be at least 3: the z-scores of two are 1 and -1, whatever they are, got {classes}"
        )
