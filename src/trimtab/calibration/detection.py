"""Calibrating an object detector: scores that tell the overlap to expect, and thresholds that pick what to pass on.

For a trained detector of any kind that gives boxes with a score: validation detections and ground truth are all that is
needed. Isotonic regression and Platt scaling, class by class, are hard to beat: in the paper they outdo detectors that
were trained to be calibrated. Temperature scaling, the usual yardstick, cannot shift a score and is a weak one.

Kuzucu, Oksuz, Sadeghi, Dokania (2024), arXiv 2405.20459. In two steps: drop the detections below the threshold of their
class (the one of lowest LRP error, or a constant), fit the calibrators on the rest, and find the best thresholds anew
on the calibrated scores. Steps, targets and defaults are those of the authors' code. Departures:

- *The optimum, not so many steps.* The code fits Platt's and the temperature's parameters by one call of L-BFGS without
  line search. Where that converges, calibrated scores agree to 1e-4. On one of the golden cases, made with the authors'
  code, it ends at T = 20, with 1.5 times the loss of the optimum at T = 0.51; with the same numbers rounded otherwise,
  or in another order, it ends at 24, 28, 34 or 41. Newton's method finds the optimum of these convex losses.
- A slope is kept >= 0, where the code takes |a|, and 1/T >= 0.01, where it takes |T|; a Gaussian prior of standard
  deviation 1000 keeps both finite on separable data.
- In class-agnostic mode, a class without detections raises a KeyError in the code; here it costs nothing.
- The code's grid search for the temperature refers to attributes that do not exist; it is left out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, Self

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import minimize
from sklearn.isotonic import IsotonicRegression
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from trimtab.calibration.base import Fitted
from trimtab.calibration.solve import newton
from trimtab.core import checks
from trimtab.core.checks import InputError
from trimtab.core.detections import Detections, GroundTruth
from trimtab.metrics import Matches, lrp_optimal_thresholds, match_detections

Kind = Literal["isotonic", "linear", "platt", "temperature", "identity"]
Target = Literal["iou", "tp"]
Loss = Literal["bce", "qfl"]
Search = Literal["optimum", "lbfgs", "grid"]

_PRIOR_SD = 1000.0
_FLATTEST = 0.01  # smallest 1/T
_ROUNDING = 2.2e-16  # scores are kept this far from 0 and 1 before their log-odds are taken
_BLOCK_ELEMENTS = 1 << 22


class DetectionCalibrator(Fitted):
    """Thresholds and monotone maps of a detector's scores, fitted on validation detections.

    Args:
        kind: ``"isotonic"`` regression; ``"linear"`` regression with slope >= 0; ``"platt"``, sigmoid(a z + b) of the
            score's log-odds z; ``"temperature"``, sigmoid(z / T); or ``"identity"``, thresholds alone.
        classwise: one map a class; False pools all classes.
        target: what a score is to mean: ``"iou"``, the expected overlap (0 for false positives), as LaECE and LaACE
            judge it, or ``"tp"``, the probability of a true positive, as D-ECE does.
        thresholds: ``"lrp"``, the threshold of lowest LRP error of each class, before and after calibration, or one
            number for all classes, in both places. The paper takes 0.3 with ``"tp"``.
        tau: least overlap of a true positive; by default 0 with ``"iou"`` and 0.5 with ``"tp"``, as in the paper.
        loss: for Platt and temperature: ``"bce"``, the cross-entropy, or ``"qfl"``, the quality focal loss, which
            weights it by \\|sigmoid - target\\|.
        search: for Platt and temperature: ``"optimum"``; ``"lbfgs"``, the authors' way, to compare with their numbers;
            or, for Platt, ``"grid"``, their 100 x 100 grid of a in 0..10 and b in -5..5.
        max_detections: how many detections of an image and class count; 100 for COCO, 300 for LVIS.

    Attributes:
        thresholds_before, thresholds_after: (classes,) of raw and of calibrated scores; NaN or -1 keep all.
        maps: (2, m): scores and values of isotonic knots, or slopes and shifts, or 1/T and 0; map after map.
        offsets: (k + 1,): map g has the columns offsets[g] to offsets[g + 1] of `maps`, none where nothing could be
            fitted: then scores stay as they are.

    Raises:
        InputError: an argument is not one of these, or goes with another kind.

    Example:
        >>> import torch
        >>> from trimtab.calibration import DetectionCalibrator
        >>> from trimtab.core.detections import Detections, GroundTruth
        >>> image, label = torch.arange(4), torch.zeros(4, dtype=torch.int64)
        >>> boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0]]).repeat(4, 1)
        >>> truth = GroundTruth(image, label, boxes, torch.zeros(4, dtype=torch.bool), range(4), ["boat"])
        >>> scores = torch.tensor([0.9, 0.7, 0.5, 0.6])
        >>> found = Detections(image, label, boxes * torch.tensor([1, 1, 0.8, 1]), scores, 4, 1)
        >>> DetectionCalibrator().fit(truth, found).transform(found).scores
        tensor([0.8000, 0.8000, 0.8000, 0.8000])

    Reference:
        Kuzucu et al., On Calibration of Object Detectors: Pitfalls, Evaluation and Baselines, ECCV 2024.
    """

    thresholds_before: Tensor
    thresholds_after: Tensor
    maps: Tensor
    offsets: Tensor

    def __init__(
        self,
        kind: Kind = "isotonic",
        *,
        classwise: bool = True,
        target: Target = "iou",
        thresholds: Literal["lrp"] | float = "lrp",
        tau: float | None = None,
        loss: Loss = "bce",
        search: Search = "optimum",
        max_detections: int = 100,
    ) -> None:
        super().__init__()
        self.kind = checks.one_of(kind, "kind", Kind)
        self.target = checks.one_of(target, "target", Target)
        self.loss = checks.one_of(loss, "loss", Loss)
        self.search = checks.one_of(search, "search", Search)
        if loss != "bce" and kind not in ("platt", "temperature"):
            raise InputError(f"loss goes with platt and temperature, {kind} has none to choose")
        if search != "optimum" and kind != "platt" and (kind, search) != ("temperature", "lbfgs"):
            raise InputError(f"search must be 'optimum' for {kind}, got {search!r}")
        self.classwise = classwise
        if thresholds != "lrp" and isinstance(thresholds, str):
            raise InputError(f"thresholds must be 'lrp' or a number, got {thresholds!r}")
        self.thresholds = thresholds if thresholds == "lrp" else checks.number(thresholds, "thresholds", low=0, high=1)
        self.tau = None if tau is None else checks.number(tau, "tau", low=0, high=1, high_open=True)
        self.max_detections = checks.integer(max_detections, "max_detections", low=1)
        self._declare("thresholds_before", "thresholds_after", "maps", "offsets")

    def fit(self, truth: GroundTruth, detections: Detections) -> Self:
        """Fit to validation images: images that the detector was not trained on.

        Args:
            truth: what is in them.
            detections: what the detector reports, with all scores: the thresholds are found here.

        Returns:
            self.

        Raises:
            InputError: images or classes of the two do not agree.
        """
        before = self._thresholds(self._match(truth, detections))
        kept = detections.above(before)
        matches = self._match(truth, kept)
        counted = ~matches.ignored
        target = (matches.iou if self.target == "iou" else matches.hit.double())[counted]
        group = matches.label[counted] * self.classwise
        groups = truth.classes if self.classwise else 1
        maps, lengths = self._maps(matches.scores[counted], target, group, groups)
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        self._store(before, thresholds_before=before, maps=maps, offsets=offsets)
        after = self._thresholds(self._match(truth, self._mapped(kept)))
        self._store(before, thresholds_after=after)
        return self

    def forward(self, scores: Float[Tensor, " n"], labels: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Calibrated scores, in the precision that came; no threshold is applied, and values are not checked.

        Raises:
            InputError: the calibrator is not fitted.
        """
        self._must_be_fitted()
        return self._calibrated(scores, labels)

    def transform(self, detections: Detections) -> Detections:
        """Drop the detections below the thresholds, calibrate the rest, and drop again.

        Raises:
            InputError: the calibrator is not fitted, or was fitted to another number of classes.
        """
        self._must_be_fitted()
        if detections.classes != len(self.thresholds_before):
            fitted = len(self.thresholds_before)
            raise InputError(f"detections must be of {fitted} classes as in fit, they are of {detections.classes}")
        place = detections.scores.device
        kept = self._mapped(detections.above(self.thresholds_before.to(place)))
        return kept.above(self.thresholds_after.to(place))

    @property
    def matching_tau(self) -> float:
        """The least overlap of a true positive in effect."""
        return self.tau if self.tau is not None else 0.0 if self.target == "iou" else 0.5

    def _match(self, truth: GroundTruth, detections: Detections) -> Matches:
        return match_detections(truth, detections, tau=self.matching_tau, max_detections=self.max_detections)

    def _thresholds(self, matches: Matches) -> Tensor:
        if isinstance(self.thresholds, str):
            return lrp_optimal_thresholds(matches)
        return torch.full((matches.classes,), self.thresholds, dtype=torch.float64, device=matches.scores.device)

    def _mapped(self, detections: Detections) -> Detections:
        return replace(detections, scores=self._calibrated(detections.scores, detections.label))

    def _calibrated(self, scores: Tensor, labels: Tensor) -> Tensor:
        s = scores.double()
        group = labels if self.classwise else torch.zeros_like(labels)
        start, stop = self.offsets[group], self.offsets[group + 1]
        fitted = stop > start
        if not bool(fitted.any()):
            return scores
        first, last = start.clamp(max=self.maps.shape[1] - 1), (stop - 1).clamp(min=0)
        if self.kind == "isotonic":
            value = self._interpolated(s, first, last)
        else:
            slope, shift = self.maps[:, first]
            x = s if self.kind == "linear" else _log_odds(s)
            value = slope * x + shift
            value = value if self.kind == "linear" else value.sigmoid()
        return torch.where(fitted, value.clamp(0, 1), s).to(scores.dtype)

    def _maps(self, s: Tensor, target: Tensor, group: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        """The maps of all groups, column after column, and how many columns each has."""
        sizes = torch.bincount(group, minlength=groups)
        if self.kind == "identity" or not len(s):
            return s.new_zeros(2, 0), torch.zeros_like(sizes)
        if self.kind == "isotonic":
            order = group.argsort(stable=True)
            parts = [_isotonic(*xy) for xy in zip(*(torch.split(x[order], sizes.tolist()) for x in (s, target)))]
            lengths = torch.tensor([part.shape[1] for part in parts], device=s.device)
            return torch.cat(parts, 1).to(s), lengths
        present, at = torch.unique(group, return_inverse=True)
        if self.kind == "linear":
            maps = _linear(s, target, at, len(present))
        else:
            shifted = self.kind == "platt"
            z = _log_odds(s)
            if self.search == "optimum" and self.loss == "bce":
                return _optimum(z, target, at, len(present), shifted), (sizes > 0).long()
            order = group.argsort(stable=True)
            held = sizes[present].tolist()
            found = [
                _authors_steps(x, t, shifted, self.loss)
                if self.search == "lbfgs"
                else _grid(x, t, shifted, self.loss, refine=self.search == "optimum")
                for x, t in zip(torch.split(z[order], held), torch.split(target[order], held))
            ]
            maps = torch.stack(found, 1).to(z)
        return maps, (sizes > 0).long()

    def _interpolated(self, s: Tensor, first: Tensor, last: Tensor) -> Tensor:
        """Linear interpolation between the knots first..last of each score; constant beyond them."""
        x, y = self.maps
        low, high = first, last  # the last knot at or below the score, by bisection
        for _ in range(len(x).bit_length()):
            middle = (low + high + 1) // 2
            below = x[middle] <= s
            low, high = torch.where(below, middle, low), torch.where(below, high, torch.maximum(middle - 1, low))
        above = torch.minimum(low + 1, last)
        width = x[above] - x[low]
        share = ((s - x[low]) / width.where(width > 0, 1)).clamp(0, 1)
        return y[low] + (y[above] - y[low]) * share


def _log_odds(s: Tensor) -> Tensor:
    return s.clamp(_ROUNDING, 1 - _ROUNDING).logit()


def _isotonic(s: Tensor, target: Tensor) -> Tensor:
    """The knots of scikit-learn's isotonic regression."""
    if not len(s):
        return s.new_zeros(2, 0)
    fitted = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(s.cpu().numpy(), target.cpu().numpy())
    return torch.from_numpy(np.stack([fitted.X_thresholds_, fitted.y_thresholds_]))


def _linear(s: Tensor, target: Tensor, group: Tensor, groups: int) -> Tensor:
    """Least squares with a slope >= 0, one column a group."""
    n = torch.bincount(group, minlength=groups)

    def mean(x: Tensor) -> Tensor:
        return torch.bincount(group, x, minlength=groups) / n

    middle, height = mean(s), mean(target)
    away = s - middle[group]
    spread = mean(away * away)
    slope = (mean(away * target) / spread.where(spread > 0, 1)).clamp(min=0)
    return torch.stack([slope, height - slope * middle])


def _optimum(z: Tensor, target: Tensor, group: Tensor, groups: int, shifted: bool) -> Tensor:
    """sigmoid(a z + b) of lowest cross-entropy in every group; b = 0 unless `shifted`."""
    n = torch.bincount(group, minlength=groups)
    columns = torch.stack([z, torch.ones_like(z)], 1) if shifted else z[:, None]
    d = columns.shape[1]
    products = (columns[:, :, None] * columns[:, None, :]).flatten(1)
    start = torch.tensor([1.0, 0.0], dtype=torch.float64, device=z.device)[:d].repeat(groups, 1)
    prior = 1 / (n * _PRIOR_SD**2)

    def mean(x: Tensor) -> Tensor:
        return z.new_zeros(groups, x.shape[1]).index_add_(0, group, x) / n[:, None]

    def objective(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u = (columns * x[group]).sum(1)
        p = u.sigmoid()
        away = x - start
        loss = mean((softplus(u) - target * u)[:, None])[:, 0] + prior * away.square().sum(1) / 2
        gradient = mean(columns * (p - target)[:, None]) + prior[:, None] * away
        hessian = mean(products * (p * (1 - p))[:, None]).view(-1, d, d)
        return loss, gradient, hessian + prior[:, None, None] * torch.eye(d, dtype=z.dtype, device=z.device)

    lower = torch.tensor([0.0, -torch.inf] if shifted else [_FLATTEST], dtype=torch.float64)
    found = newton(objective, start, lower=lower)
    return torch.cat([found, torch.zeros_like(found[:, :1])], 1)[:, :2].mT.contiguous()


def _authors_steps(z: Tensor, target: Tensor, shifted: bool, loss: Loss) -> Tensor:
    """a and b after one call of L-BFGS without line search: not always near the optimum."""
    slope, shift = (torch.tensor(x, dtype=z.dtype, device=z.device, requires_grad=True) for x in (1.0, 0.0))
    solver = torch.optim.LBFGS([slope, shift] if shifted else [slope], lr=0.1, max_iter=100)

    def steepness() -> Tensor:
        return slope.abs() if shifted else 1 / slope.abs()

    def closure() -> float:
        solver.zero_grad()
        value = _losses(steepness() * z + shift, target, loss)
        value.backward()
        return float(value.detach())

    with torch.enable_grad():
        solver.step(closure)
    return torch.stack([steepness(), shift]).detach()


def _grid(z: Tensor, target: Tensor, shifted: bool, loss: Loss, *, refine: bool) -> Tensor:
    """The best a and b of the authors' grid; with `refine` of a coarser one, and the minimum next to it.

    The quality focal loss has kinks, so that only a search without derivatives ends where it should.
    """
    steps = 26 if refine else 100
    flattest = 0.0 if shifted else _FLATTEST
    axes = [torch.linspace(flattest, 10, steps, dtype=z.dtype)]
    axes += [torch.linspace(-5, 5, steps, dtype=z.dtype) if shifted else torch.zeros(1, dtype=z.dtype)]
    points = torch.cartesian_prod(*axes).to(z.device)
    blocks = torch.split(points, max(1, _BLOCK_ELEMENTS // len(z)))
    best = points[torch.cat([_losses(p[:, :1] * z + p[:, 1:], target, loss) for p in blocks]).argmin()]
    if not refine:
        return best
    free = 1 + shifted

    def value(u: np.ndarray) -> float:
        return float(_losses(float(u[0]) * z + (float(u[1]) if shifted else 0.0), target, loss))

    bounds = [(flattest, None), (None, None)][:free]
    found = minimize(value, best[:free].cpu().numpy(), method="Nelder-Mead", bounds=bounds).x
    return torch.tensor([found[0], found[1] if shifted else 0.0], dtype=z.dtype)


def _losses(u: Tensor, target: Tensor, loss: Loss) -> Tensor:
    """The mean loss of log-odds along the last axis."""
    entropy = binary_cross_entropy_with_logits(u, target.expand_as(u), reduction="none")
    return (entropy * (u.sigmoid() - target).abs() if loss == "qfl" else entropy).mean(-1)
