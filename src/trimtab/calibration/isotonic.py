"""Isotonic regression: the best monotone map of each class's score, with no shape assumed.

For large calibration sets (thousands of samples of every class) whose miscalibration bends in ways that no sigmoid
follows. With more classes every class is calibrated against the rest and the answers are divided by their sum, which
may change which class is predicted.

Zadrozny and Elkan (2002), KDD; the pool-adjacent-violators algorithm is SciPy's. Plain isotonic regression answers 0
and 1 at its ends, and one surprise costs an infinite log loss. Here one sample is added at each end of the scores,
which counts 1/c as a hit: an end block without a hit among m samples gets (1/c) / (m + 1), which for two classes is the
usual (0 + 1/2) / (m + 1), and which over all classes adds up to one surprise in m + 1, however many classes there are.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import isotonic_regression
from torch import Tensor

from trimtab.calibration import one_vs_rest
from trimtab.calibration.base import Calibrator


class IsotonicCalibration(Calibrator):
    """A non-decreasing, piecewise linear map from each class's log-odds to its probability.

    Scores that tie are one point. Each pooled block is constant from its first to its last score; between two blocks
    the probability is interpolated linearly in the log-odds; beyond the ends it stays.

    Args:
        allow_zero: leave out the two added samples, as scikit-learn does: probabilities of zero become possible, and a
            sample of which every class's is zero gets the uniform distribution.

    Attributes:
        knots, values: (k, m) log-odds, ascending in each row, and probabilities there; rows are filled up with copies
            of their last knot. k = 1 for two classes (class 1 against class 0), else c.

    Example:
        >>> import torch
        >>> from trimtab.calibration import IsotonicCalibration
        >>> logits = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
        >>> calibrator = IsotonicCalibration().fit(logits, torch.tensor([0, 1, 0, 1]))
        >>> calibrator(logits).exp()[:, 1]
        tensor([0.2500, 0.5000, 0.5000, 0.7500])

    Reference:
        Zadrozny and Elkan, Transforming Classifier Scores into Accurate Multiclass Probability Estimates, KDD 2002.
    """

    knots: Tensor
    values: Tensor

    def __init__(self, *, allow_zero: bool = False) -> None:
        super().__init__()
        self.allow_zero = allow_zero
        self._declare("knots", "values")

    def _fit(self, logits: Tensor, labels: Tensor, weights: Tensor | None) -> None:
        odds = one_vs_rest.log_odds(logits).mT.contiguous()
        c, k = logits.shape[1], len(odds)
        prior = None if self.allow_zero else 1 / c
        maps = [_monotone(row, labels == kind, weights, prior) for row, kind in zip(odds, range(c - k, c))]
        most = max(len(x) for x, _ in maps)
        knots, values = (torch.stack([_filled(m[i], most) for m in maps]) for i in (0, 1))
        self._store(logits, knots=knots, values=values)

    def _log_probs(self, logits: Tensor) -> Tensor:
        odds = one_vs_rest.log_odds(logits).mT.contiguous()
        knots, values = self.knots.to(logits.dtype), self.values.to(logits.dtype)
        right = torch.searchsorted(knots, odds.detach()).clamp(1, knots.shape[1] - 1)
        left = right - 1
        width = knots.gather(1, right) - knots.gather(1, left)
        share = ((odds - knots.gather(1, left)) / width.where(width > 0, torch.ones_like(width))).clamp(0, 1)
        return one_vs_rest.from_probabilities(torch.lerp(values.gather(1, left), values.gather(1, right), share).mT)


def _monotone(scores: Tensor, hits: Tensor, w: Tensor | None, prior: float | None) -> tuple[Tensor, Tensor]:
    """The first and last score of every pooled block, and the blocks' probabilities there."""
    x, order, apart = one_vs_rest.ascending(scores)
    starts = torch.cat([order.new_zeros(1), apart.nonzero()[:, 0] + 1])
    sizes = torch.cat([starts, order.new_tensor([len(x)])]).diff()
    mass = torch.ones_like(x, dtype=torch.float64) if w is None else w[order].double()
    weight, hit = (torch.segment_reduce(v, "sum", lengths=sizes) for v in (mass, mass * hits[order]))
    if prior is not None:
        for end in (0, -1):
            weight[end] += 1
            hit[end] += prior
    fit = isotonic_regression((hit / weight).cpu().numpy(), weights=weight.cpu().numpy())
    ends = np.union1d(fit.blocks[:-1], fit.blocks[1:] - 1)
    return x[starts[torch.from_numpy(ends).to(x.device)]], torch.from_numpy(fit.x[ends])


def _filled(row: Tensor, length: int) -> Tensor:
    """The row with copies of its last entry behind it, at least two entries in all."""
    return torch.cat([row, row[-1:].expand(max(length, 2) - len(row))])
