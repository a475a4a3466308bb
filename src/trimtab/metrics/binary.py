"""Calibration error of one probability for one event: stated p against how often the event happens.

For detectors of one thing, risk scores and single labels of many. The measures of the top label look at
max(p, 1 - p) and at being right; this one looks at p itself, so that "0.2" has to be right about the event one time in
five.

Naeini, Cooper, Hauskrecht 2015; Kumar, Liang, Ma 2019, arXiv 1909.10155 (the root-mean-square norm). The norms are
those of torchmetrics, whose bins are [lower, upper) where ours are (lower, upper].
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trimtab.core import checks
from trimtab.core.checks import InputError
from trimtab.metrics.binning import bin_sums
from trimtab.metrics.rows import working
from trimtab.metrics.sums import SumMetric

Probabilities = Float[Tensor, " n"] | Float[np.ndarray, " n"]
Outcomes = Bool[Tensor, " n"] | Bool[np.ndarray, " n"] | Int[Tensor, " n"] | Int[np.ndarray, " n"]
Norm = Literal["l1", "l2", "max"]


def binary_calibration_error(probs: Probabilities, outcomes: Outcomes, bins: int = 15, norm: Norm = "l1") -> float:
    """Distance between the mean probability of a bin and the share of events in it, over equal-width bins.

    Args:
        probs: probability of the event (n,), in 0..1; tensor or array.
        outcomes: whether it happened (n,), booleans or integers 0 and 1.
        bins: equal-width bins (lower, upper] of the probability in 0..1; 15 as in `expected_calibration_error`.
        norm: ``"l1"``: mean of the distances, weighted by the bins' samples; ``"l2"``: root of the mean of their
            squares; ``"max"``: the largest.

    Returns:
        The error, in 0..1.

    Raises:
        InputError: an argument is malformed.

    Example:
        >>> import numpy as np
        >>> round(binary_calibration_error(np.array([0.1, 0.2, 0.9, 0.7]), np.array([0, 0, 1, 1])), 3)
        0.175

    Reference:
        Kumar, Liang, Ma, arXiv 1909.10155.
    """
    metric = BinaryCalibrationError(bins, norm)
    metric.update(probs, outcomes)
    return float(metric.compute())


def _checked(probs: Any, outcomes: Any) -> tuple[Float[Tensor, " n"], Bool[Tensor, " n"]]:
    p = checks.tensor(probs, "probs").detach()
    if p.ndim != 1 or not p.is_floating_point() or len(p) == 0:
        raise InputError(f"probs must be floating point of shape (n,), n >= 1, got {p.dtype} {tuple(p.shape)}")
    outside = (checks.finite(p, "probs") < 0) | (p > 1)
    if bool(outside.any()):
        raise InputError(f"probs must lie in [0, 1], found {p[outside][0].item():.6g} at {checks.first_bad(outside)}")
    happened = checks.tensor(outcomes, "outcomes")
    whole = happened.long() if happened.dtype == torch.bool else happened
    return working(p), checks.labels(whole, len(p), 2, "outcomes").bool().to(p.device)


class BinaryCalibrationError(SumMetric):
    """`binary_calibration_error` over batches; its state is two sums a bin.

    Example:
        >>> import torch
        >>> metric = BinaryCalibrationError(bins=10, norm="max")
        >>> metric.update(torch.tensor([0.25, 0.75]), torch.tensor([0, 1]))
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    higher_is_better = False
    gap: Tensor
    samples: Tensor

    def __init__(self, bins: int = 15, norm: Norm = "l1", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.bins, self.norm = checks.integer(bins, "bins", low=1), checks.one_of(norm, "norm", Norm)
        self._sum(gap=bins, samples=bins)

    def update(self, probs: Probabilities, outcomes: Outcomes) -> None:
        """Add a batch: probabilities (n,) and what happened (n,)."""
        p, happened = _checked(probs, outcomes)
        sums = bin_sums(p[None], happened[None], self.bins)
        self.gap += sums.gap[0]
        self.samples += sums.samples[0]

    def compute(self) -> Tensor:
        """The error of all batches together."""
        distance, share = self.gap.abs() / self.samples.clamp(min=1), self.samples / self.samples.sum()
        if self.norm == "max":
            return distance.max()
        return share @ distance if self.norm == "l1" else (share @ distance.square()).sqrt()
