"""Brier score, and its split into reliability, resolution and uncertainty.

A proper loss like the log loss, but bounded: a confident mistake costs 2 at most. The split tells what a high score is
due to: reliability is what calibration can win, resolution is what the model knows, uncertainty is in the labels.

Brier 1950; Murphy 1973, "A New Vector Partition of the Probability Score"; Stephenson, Coelho, Jolliffe 2008, "Two
Extra Components in the Brier Score Decomposition". The sum over classes is meant throughout, in 0..2. scikit-learn's
binary `brier_score_loss` is half of it, and so are implementations that "scale by half".
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.core import checks
from trimtab.core.checks import InputError
from trimtab.metrics.binning import bin_sums
from trimtab.metrics.rows import Labels, Matrix, checked, columns
from trimtab.metrics.sums import MeanMetric, SumMetric


class BrierParts(NamedTuple):
    """Brier score = reliability - resolution + uncertainty + within_bins."""

    reliability: float
    resolution: float
    uncertainty: float
    within_bins: float


def brier_score(probs: Matrix, labels: Labels) -> float:
    """Mean over samples of sum over classes of (p - one-hot label)^2.

    Args:
        probs: probabilities (n, c), rows sum to one; tensor or array.
        labels: true classes (n,), integers in 0..c-1.

    Returns:
        The score, in 0..2, lower is better.

    Raises:
        InputError: probabilities or labels are malformed.

    Example:
        >>> import numpy as np
        >>> brier_score(np.array([[0.5, 0.5], [0.25, 0.75]]), np.array([0, 1]))
        0.3125

    Reference:
        Brier, Monthly Weather Review 1950.
    """
    p, y = checked(probs, labels)
    return float(_squared(p, y).sum() / len(p))


def brier_decomposition(probs: Matrix, labels: Labels, bins: int = 15) -> BrierParts:
    """Split the Brier score, class by class over equal-width bins of its probability, and add up the classes.

    With o = share of a class's label, o_b and p_b = that share and the mean probability in bin b:
    reliability = sum (n_b / n)(p_b - o_b)^2, resolution = sum (n_b / n)(o_b - o)^2, uncertainty = o (1 - o).
    The rest is what happens inside the bins, zero if the probabilities in a bin are equal.

    Args:
        probs: probabilities (n, c), rows sum to one; tensor or array.
        labels: true classes (n,), integers in 0..c-1.
        bins: equal-width bins (lower, upper] of each class's probability.

    Raises:
        InputError: an argument is malformed.

    Example:
        >>> import numpy as np
        >>> probs, labels = np.array([[0.5, 0.5], [0.25, 0.75]]), np.array([0, 1])
        >>> brier_decomposition(probs, labels)
        BrierParts(reliability=0.3125, resolution=0.5, uncertainty=0.5, within_bins=0.0)

    Reference:
        Murphy, J. Applied Meteorology 1973; Stephenson, Coelho, Jolliffe, Weather and Forecasting 2008.
    """
    checks.integer(bins, "bins", low=1)
    p, y = checked(probs, labels)
    return _parts(_class_sums(p, y, bins), _squared(p, y).sum())


def _squared(p: Float[Tensor, "n c"], y: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Squared distance of each row to its label's corner: others' squares, and (1 - p)^2 of its own."""
    own = p.gather(1, y[:, None])[:, 0].double()
    others = p.scatter(1, y[:, None], 0)
    return torch.linalg.vecdot(others, others).double() + (1 - own) ** 2


def _class_sums(p: Float[Tensor, "n c"], y: Int[Tensor, " n"], bins: int) -> Float[Tensor, "3 c bins"]:
    """Samples, summed probabilities and hits in every bin of every class."""
    sums = []
    for first, group in columns(p):
        hits = y == torch.arange(first, first + len(group), device=y.device)[:, None]
        sums.append(torch.stack(bin_sums(group, hits, bins)))
    return torch.cat(sums, 1)


def _parts(sums: Float[Tensor, "3 c bins"], squared: Float[Tensor, ""]) -> BrierParts:
    samples, probability, hits = sums
    n = samples[0].sum()
    held = samples.clamp(min=1)
    rate = hits.sum(1, keepdim=True) / n
    reliability = float((samples * ((probability - hits) / held) ** 2).sum() / n)
    resolution = float((samples * (hits / held - rate) ** 2).sum() / n)
    uncertainty = float((rate * (1 - rate)).sum())
    return BrierParts(reliability, resolution, uncertainty, float(squared / n) - reliability + resolution - uncertainty)


class BrierScore(MeanMetric):
    """`brier_score` over batches; its state is one sum.

    Example:
        >>> import torch
        >>> metric = BrierScore()
        >>> metric.update(torch.tensor([[0.5, 0.5], [0.25, 0.75]]), torch.tensor([0, 1]))
        >>> metric.compute()
        tensor(0.3125, dtype=torch.float64)
    """

    higher_is_better = False

    def update(self, probs: Matrix, labels: Labels) -> None:
        """Add a batch: probabilities (n, c) and labels (n,)."""
        self._add(_squared(*checked(probs, labels)))


class BrierDecomposition(SumMetric):
    """`brier_decomposition` over batches; its state is three sums a class and bin.

    Example:
        >>> import torch
        >>> metric = BrierDecomposition(num_classes=2)
        >>> metric.update(torch.tensor([[0.5, 0.5], [0.25, 0.75]]), torch.tensor([0, 1]))
        >>> metric.compute().uncertainty
        0.5
    """

    sums: Tensor
    total: Tensor

    def __init__(self, num_classes: int, bins: int = 15, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_classes = checks.integer(num_classes, "num_classes", low=2)
        self.bins = checks.integer(bins, "bins", low=1)
        self._sum(sums=(3, num_classes, bins), total=1)

    def update(self, probs: Matrix, labels: Labels) -> None:
        """Add a batch: probabilities (n, c) and labels (n,)."""
        p, y = checked(probs, labels)
        if p.shape[1] != self.num_classes:
            raise InputError(f"probs must have {self.num_classes} columns, got {p.shape[1]}")
        self.sums += _class_sums(p, y, self.bins)
        self.total += _squared(p, y).sum()

    def compute(self) -> BrierParts:
        """The parts of all batches together."""
        return _parts(self.sums, self.total[0])
