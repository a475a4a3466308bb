"""Matrix scaling on log-probabilities: Dirichlet calibration with the paper's off-diagonal and intercept penalties.

The most flexible of the linear maps: every class's score may depend on every other's. For a model that takes some
classes for one another more often than it admits, with hundreds of samples a class or more; may change which class is
predicted.

Kull, Perello-Nieto, Kängsepp, Silva Filho, Song, Flach (2019), arXiv 1910.12656. The authors choose lambda and mu from
a grid by cross-validation and train with Adam from the identity; here the optimum of the penalised likelihood is found,
only lambda is chosen by held-out log loss, and the diagonal, free in the paper, is drawn weakly to the
temperature-scaled model, without which separable data or an absent class would leave no optimum (``diagonal=0`` frees
it).

What we found: how far the off-diagonal weights should be let go differs by a factor of ten between score sets. A fixed
spread that suits a language model of 65 classes (0.15: log loss 1.99 against 2.35 with slopes and shifts alone) makes
100 classes that are not mixed up worse than no correction of that kind at all (2.84 against 2.32).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from trimtab.calibration import multinomial
from trimtab.calibration.base import Calibrator
from trimtab.calibration.solve import lbfgs, newton
from trimtab.core import checks

_NEWTON_PARAMETERS = 1000
_NEWTON_WORK = 2e9  # multiplications for one Hessian, beyond which L-BFGS is faster
_SPREADS = (0.0, 0.005, 0.015, 0.05, 0.15)
_LEFT = 1e-3  # log likelihood of all samples that L-BFGS may leave to win
_FOLDS = 4
_ROWS_TO_CHOOSE_ON = 1000  # held-out rows beyond which one fold is enough
_ROUGH = 3e-5  # log loss left to win that no choice between spreads depends on


class MatrixScaling(Calibrator):
    """softmax(weight @ log p + bias), p = softmax(logits), fitted by penalised maximum likelihood.

    The fit minimises the mean log loss plus ``off_diagonal`` times the mean square of the off-diagonal weights plus
    ``intercept`` times the mean square of the biases (the paper's lambda and mu) plus ``diagonal`` times the mean
    square of the diagonal weights' distance from 1/T, where T is the best single temperature.

    The defaults amount to Gaussian priors: sd 1 for a bias, 0.3 for T times a diagonal weight (both chosen on score
    sets of 2 to 100 classes and 100 to 5000 samples), and for T times an off-diagonal weight the one of 0 (there are
    none), 0.005, 0.015, 0.05 and 0.15 that has the least held-out log loss in four folds; from 4000 samples on, in one
    of them. In the paper's terms lambda = c (c - 1) T^2 / (2 n sd^2) and mu = c / (2 n), with n the total weight.

    Args:
        off_diagonal: lambda, >= 0.
        intercept: mu, >= 0.
        diagonal: >= 0.

    Attributes:
        weight: (c, c), row k makes the score of class k.
        bias: (c,).
        spread: the sd that was chosen, or that `off_diagonal` amounts to.

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
    spread: Tensor

    def __init__(
        self, *, off_diagonal: float | None = None, intercept: float | None = None, diagonal: float | None = None
    ) -> None:
        super().__init__()
        self.off_diagonal = None if off_diagonal is None else checks.number(off_diagonal, "off_diagonal", low=0)
        self.intercept = None if intercept is None else checks.number(intercept, "intercept", low=0)
        self.diagonal = None if diagonal is None else checks.number(diagonal, "diagonal", low=0)
        self._declare("weight", "bias", "spread")

    def _fit(self, logits: Tensor, labels: Tensor, weights: Tensor | None) -> None:
        n, c = logits.shape
        x = logits.log_softmax(1)
        factor = multinomial.temperature_factor(x, labels, weights)
        total = multinomial.total_weight(labels, weights)
        centre = factor * torch.eye(c, c + 1, dtype=torch.float64, device=x.device)
        begin = multinomial.start(centre, factor)
        features = _Features(x, labels, weights)

        def penalty(spread: float) -> Tensor:
            return self._penalty(c, total, factor, spread).to(x.device)

        if self.off_diagonal is None:
            spread, begin = _choose(features, penalty, centre, begin, total)
        else:
            spread = math.sqrt(c * (c - 1) / (2 * total * max(self.off_diagonal, 1e-300))) / factor
        if spread == 0:
            found = features.diagonal(slice(None), penalty(1.0), centre, begin)
        elif c * (c + 1) <= _NEWTON_PARAMETERS and n * (c * (c + 1)) ** 2 <= _NEWTON_WORK:
            found = _by_newton(x, labels, weights, penalty(spread), centre, begin)
        else:
            found = features.optimum(slice(None), penalty(spread), centre, begin, _LEFT / total)
        self._store(logits, weight=found[:, :c], bias=found[:, c], spread=torch.tensor(spread))

    def _log_probs(self, logits: Tensor) -> Tensor:
        scores = logits.log_softmax(-1) @ self.weight.to(logits.dtype).mT + self.bias.to(logits.dtype)
        return scores.log_softmax(-1)

    def _penalty(self, c: int, total: float, factor: float, spread: float) -> Tensor:
        """What multiplies half the square of every entry's distance from the centre: (c, c + 1)."""

        def each(given: float | None, count: int, sd: float) -> float:
            return 1 / (total * sd**2) if given is None else 2 * given / count

        penalty = torch.full((c, c + 1), each(self.off_diagonal, c * (c - 1), spread * factor), dtype=torch.float64)
        penalty[:, c] = each(self.intercept, c, 1.0)
        penalty.diagonal().fill_(each(self.diagonal, c, 0.3 * factor))
        return penalty


class _Features:
    """The features of the linear map, log-probabilities and a one, in the coordinates that suit the search.

    Where the data curve the loss more than the penalty does, these are the principal axes; else the classes' own
    log-probabilities, less their means.
    """

    def __init__(self, x: Tensor, labels: Tensor, weights: Tensor | None) -> None:
        c = x.shape[1]
        self.rows, self.labels, self.weights = _with_one(x), labels, weights
        self.moment = torch.zeros(c + 1, c + 1, dtype=torch.float64, device=x.device)
        for f, _, shares in multinomial.blocks(self.rows, labels, weights, x.dtype):
            self.moment += f.mT @ (f * shares[:, None])
        rate = torch.bincount(labels, weights, minlength=c).double() / multinomial.total_weight(labels, weights)
        self.spread_of_outcomes = rate * (1 - rate)
        size, self.axes = torch.linalg.eigh(self.moment)
        self.curvature = float(self.spread_of_outcomes.mean() * size.mean())
        self.less_means = torch.eye(c + 1, dtype=torch.float64, device=x.device)
        self.less_means[c, :c] = -self.moment[c, :c]

    def part(self, rows: slice | Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.rows[rows], self.labels[rows], None if self.weights is None else self.weights[rows]

    def loss(self, rows: Tensor, v: Tensor) -> float:
        """The mean log loss of weights and biases `v` on the chosen rows."""
        parts = multinomial.blocks(*self.part(rows), self.rows.dtype)
        return float(sum(multinomial.log_loss(f @ v.to(f).mT, y, shares)[0] for f, y, shares in parts))

    def diagonal(self, rows: slice | Tensor, penalty: Tensor, centre: Tensor, start: Tensor) -> Tensor:
        """The same as `optimum` where all off-diagonal weights are zero."""
        c = len(centre)
        x, labels, weights = self.part(rows)
        precision, middle, begin = (torch.cat([v.diagonal(), v[:, c]]) for v in (penalty, centre, start))
        found = multinomial.slopes_and_shifts(x[:, :c], labels, weights, precision, middle, begin)
        return torch.cat([found[:c].diag(), found[c:, None]], 1)

    def optimum(self, rows: slice | Tensor, penalty: Tensor, centre: Tensor, start: Tensor, tolerance: float) -> Tensor:
        """The weights and biases (c, c + 1) that minimise the penalised loss on the chosen rows, by L-BFGS."""
        f, labels, weights = self.part(rows)
        a = self.axes if float(penalty.median()) < self.curvature else self.less_means
        f = f @ a.to(f)  # (f a) (v a^-T)^T = f v^T

        def objective(flat: Tensor) -> tuple[Tensor, Tensor]:
            u = flat.reshape(centre.shape)
            off = u @ a.mT - centre
            loss, gradient = (penalty * off.square()).sum() / 2, (penalty * off) @ a
            for block, y, shares in multinomial.blocks(f, labels, weights, f.dtype):
                part, residual, _ = multinomial.log_loss(block @ u.to(f).mT, y, shares)
                loss += part
                gradient += residual.mT @ block
            return loss, gradient.flatten()

        size = (a.mT @ self.moment @ a).diagonal().clamp(min=0)
        curvature = self.spread_of_outcomes[:, None] * size + penalty @ a.square()
        begin = torch.linalg.solve(a, start.mT).mT
        found = lbfgs(objective, begin.flatten(), curvature.flatten(), tolerance=tolerance)
        return found.reshape(centre.shape) @ a.mT


def _choose(
    features: _Features, penalty: Callable[[float], Tensor], centre: Tensor, begin: Tensor, total: float
) -> tuple[float, Tensor]:
    """The spread of the least held-out log loss, and weights near its optimum; spreads that only get worse are left."""
    fold = _folds(features)
    folds = 1 if total >= _FOLDS * _ROWS_TO_CHOOSE_ON else _FOLDS
    near = [begin] * folds
    losses: list[float] = []
    best = begin
    for spread in _SPREADS:
        for k in range(folds):
            kept = (fold != k).nonzero()[:, 0]
            if spread == 0:
                near[k] = features.diagonal(kept, penalty(1.0), centre, near[k])
            else:
                near[k] = features.optimum(kept, penalty(spread), centre, near[k], _ROUGH)
        held_out = [features.loss((fold == k).nonzero()[:, 0], near[k]) for k in range(folds)]
        losses.append(sum(held_out) / folds)
        if losses[-1] > min(losses):
            break
        best = near[0]
    return _SPREADS[losses.index(min(losses))], best


def _folds(features: _Features) -> Tensor:
    """Which fold each row is in: within each class every fourth by what it is given, copies together."""
    labels = features.labels
    at_label = features.rows.gather(1, labels[:, None])[:, 0]
    order = at_label.argsort(stable=True)
    order = order[labels[order].argsort(stable=True)]
    y = labels[order]
    new = torch.cat([y.new_ones(1), ((y.diff() != 0) | (at_label[order].diff() != 0)).long()]).cumsum(0)
    first = new[torch.searchsorted(y, y)]
    fold = torch.empty_like(labels)
    fold[order] = (new - first) % _FOLDS
    return fold


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
