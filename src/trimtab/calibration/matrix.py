"""Matrix scaling on log-probabilities: Dirichlet calibration with the paper's off-diagonal and intercept penalties.

The most flexible of the linear maps: every class's score may depend on every other's. For a model that takes some
classes for one another more often than it admits, with hundreds of samples a class or more; may change which class is
predicted.

Kull, Perello-Nieto, Kängsepp, Silva Filho, Song, Flach (2019), arXiv 1910.12656. The authors choose lambda and mu from
a grid by cross-validation and train with Adam from the identity; here the optimum of the penalised likelihood is found,
the default penalties follow from the number of classes and samples, and the diagonal, free in the paper, is drawn
weakly to the temperature-scaled model, without which separable data or an absent class would leave no optimum
(``diagonal=0`` frees it).
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.calibration import multinomial
from trimtab.calibration.base import Calibrator
from trimtab.calibration.solve import lbfgs, newton
from trimtab.core import checks

_NEWTON_PARAMETERS = 1000
_NEWTON_WORK = 2e9  # multiplications for one Hessian, beyond which L-BFGS is faster


class MatrixScaling(Calibrator):
    """softmax(weight @ log p + bias), p = softmax(logits), fitted by penalised maximum likelihood.

    The fit minimises the mean log loss plus ``off_diagonal`` times the mean square of the off-diagonal weights plus
    ``intercept`` times the mean square of the biases (the paper's lambda and mu) plus ``diagonal`` times the mean
    square of the diagonal weights' distance from 1/T, where T is the best single temperature.

    The defaults amount to Gaussian priors: sd 0.05 for T times an off-diagonal weight, 1 for a bias, 0.3 for T times a
    diagonal weight. In the paper's terms lambda = c (c - 1) T^2 / (2 n 0.05^2) and mu = c / (2 n), with n the total
    weight. They were chosen by the held-out log loss on score sets of 2 to 100 classes and 100 to 5000 samples.

    Args:
        off_diagonal: lambda, >= 0.
        intercept: mu, >= 0.
        diagonal: >= 0.

    Attributes:
        weight: (c, c), row k makes the score of class k.
        bias: (c,).

    Example:
        >>> import torch
        >>> from trimtab.calibration import MatrixScaling
        >>> generator = torch.Generator().manual_seed(0)
        >>> truth = 2 * torch.randn(4000, 3, generator=generator)
        >>> labels = truth.softmax(1).multinomial(1, generator=generator)[:, 0]
        >>> calibrator = MatrixScaling().fit(2 * truth, labels)
        >>> (2 * calibrator.weight).round().int().tolist()
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]]

    Reference:
        Kull et al., Beyond Temperature Scaling: Obtaining Well-Calibrated Multiclass Probabilities with Dirichlet
        Calibration, NeurIPS 2019.
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self, *, off_diagonal: float | None = None, intercept: float | None = None, diagonal: float | None = None
    ) -> None:
        super().__init__()
        self.off_diagonal = None if off_diagonal is None else checks.number(off_diagonal, "off_diagonal", low=0)
        self.intercept = None if intercept is None else checks.number(intercept, "intercept", low=0)
        self.diagonal = None if diagonal is None else checks.number(diagonal, "diagonal", low=0)
        self._declare("weight", "bias")

    def _fit(self, logits: Tensor, labels: Tensor, weights: Tensor | None) -> None:
        n, c = logits.shape
        x = logits.log_softmax(1)
        factor = multinomial.temperature_factor(x, labels, weights)
        centre = factor * torch.eye(c, c + 1, dtype=torch.float64, device=x.device)
        penalty = self._penalty(c, multinomial.total_weight(labels, weights), factor).to(x.device)
        size = c * (c + 1)
        solve = _by_newton if size <= _NEWTON_PARAMETERS and n * size**2 <= _NEWTON_WORK else _by_lbfgs
        found = solve(x, labels, weights, penalty, centre, multinomial.start(centre, factor))
        self._store(logits, weight=found[:, :c], bias=found[:, c])

    def _log_probs(self, logits: Tensor) -> Tensor:
        scores = logits.log_softmax(-1) @ self.weight.to(logits.dtype).mT + self.bias.to(logits.dtype)
        return scores.log_softmax(-1)

    def _penalty(self, c: int, total: float, factor: float) -> Tensor:
        """What multiplies half the square of every entry's distance from the centre: (c, c + 1)."""

        def each(given: float | None, count: int, sd: float) -> float:
            return 1 / (total * sd**2) if given is None else 2 * given / count

        penalty = torch.full((c, c + 1), each(self.off_diagonal, c * (c - 1), 0.05 * factor), dtype=torch.float64)
        penalty[:, c] = each(self.intercept, c, 1.0)
        penalty.diagonal().fill_(each(self.diagonal, c, 0.3 * factor))
        return penalty


def _with_one(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(len(x), 1)], 1)


def _by_newton(
    x: Tensor, labels: Tensor, weights: Tensor | None, penalty: Tensor, centre: Tensor, start: Tensor
) -> Tensor:
    c, d = centre.shape

    def objective(batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        v = batch.reshape(c, d)
        loss, gradient = (penalty * (v - centre).square()).sum() / 2, penalty * (v - centre)
        hessian = torch.diag(penalty.flatten())
        same_class = hessian.view(c, d, c, d).diagonal(dim1=0, dim2=2)
        for block, y, shares in multinomial.blocks(x, labels, weights):
            f = _with_one(block)
            part, residual, p = multinomial.log_loss(f @ v.mT, y, shares)
            loss += part
            gradient += residual.mT @ f
            mass = p * shares[:, None]
            by_class = (p[:, :, None] * f[:, None, :]).flatten(1)
            hessian -= by_class.mT @ (by_class * shares[:, None])
            same_class += (f.mT @ (mass[:, :, None] * f[:, None, :]).flatten(1)).reshape(d, c, d).permute(0, 2, 1)
        return loss[None], gradient.reshape(1, -1), hessian[None]

    return newton(objective, start.reshape(1, -1)).reshape(c, d)


def _by_lbfgs(
    x: Tensor, labels: Tensor, weights: Tensor | None, penalty: Tensor, centre: Tensor, start: Tensor
) -> Tensor:
    """L-BFGS along the principal axes of the features, in which the curvature is nearly diagonal."""
    c, d = centre.shape
    moment = torch.zeros(d, d, dtype=torch.float64, device=x.device)
    for block, _, shares in multinomial.blocks(x, labels, weights):
        f = _with_one(block)
        moment += f.mT @ (f * shares[:, None])
    size, axes = torch.linalg.eigh(moment)

    def objective(u: Tensor) -> tuple[Tensor, Tensor]:
        v = u.reshape(c, d) @ axes.mT
        loss, gradient = (penalty * (v - centre).square()).sum() / 2, penalty * (v - centre)
        for block, y, shares in multinomial.blocks(x, labels, weights):
            f = _with_one(block)
            part, residual, _ = multinomial.log_loss(f @ v.mT, y, shares)
            loss += part
            gradient += residual.mT @ f
        return loss, (gradient @ axes).flatten()

    rate = torch.bincount(labels, weights, minlength=c).double() / multinomial.total_weight(labels, weights)
    curvature = (rate * (1 - rate))[:, None] * size.clamp(min=0) + penalty @ axes.square()
    return lbfgs(objective, (start @ axes).flatten(), curvature.flatten()).reshape(c, d) @ axes.mT
