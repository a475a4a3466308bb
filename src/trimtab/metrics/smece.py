"""Smooth calibration error: the gap between hits and confidences after smoothing, at the scale that it sets itself.

ECE jumps as a sample crosses the edge of a bin, and depends on how many bins there are. Here gaps are smoothed by a
Gaussian of width s instead, and s is the width at which the smoothed error is s itself: what is finer than the error is
noise. The result is within a constant factor of the distance to the nearest perfectly calibrated predictor, which ECE
is not. Reach for it where one number must be comparable between models and sample sizes.

Błasiok, Nakkiran 2023, arXiv 2309.12236. As in their package (relplot) the Gaussian is reflected at 0 and 1 and
evaluated on a grid: here of 4096 cells, on which a sample is shared by the two nearest. Reflection at both ends makes
smoothing a product in the cosine transform.
"""

from __future__ import annotations

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from trimtab.core.threads import one_thread
from trimtab.metrics.binning import Ranked
from trimtab.metrics.confidences import ConfidenceMetric
from trimtab.metrics.rows import Labels, Matrix

_CELLS = 1 << 12
_HALVINGS = 40


def smooth_calibration_error(probs: Matrix, labels: Labels) -> float:
    """The s with integral over t in 0..1 of |(1/n) sum of (hit - p) K_s(p, t)| = s, p the confidence.

    K_s is the Gaussian density of standard deviation s around p, reflected at 0 and 1.

    Args:
        probs: probabilities (n, c), rows sum to one; tensor or array.
        labels: true classes (n,), integers in 0..c-1.

    Returns:
        The error, in 0..1.

    Raises:
        InputError: probabilities or labels are malformed.

    Example:
        >>> import numpy as np
        >>> probs = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6]])
        >>> round(smooth_calibration_error(probs, np.array([0, 0, 1, 0])), 3)
        0.132

    Reference:
        Błasiok, Nakkiran, Smooth ECE: Principled Reliability Diagrams via Kernel Smoothing, ICLR 2024,
        arXiv 2309.12236.
    """
    metric = SmoothCalibrationError()
    metric.update(probs, labels)
    return float(metric.compute())


class SmoothCalibrationError(ConfidenceMetric):
    """`smooth_calibration_error` over batches; its state is all confidences.

    Example:
        >>> import torch
        >>> metric = SmoothCalibrationError()
        >>> metric.update(torch.tensor([[0.75, 0.25], [0.25, 0.75]]), torch.tensor([0, 1]))
        >>> round(float(metric.compute()), 2)
        0.25
    """

    higher_is_better = False

    def compute(self) -> Tensor:
        """The error of all batches together."""
        return _fixed_point(_cosines(self._ranked()))


def _cosines(ranked: Ranked) -> Complex[Tensor, " frequencies"]:
    """The cosine transform of the gaps (hit - confidence) / n on the grid's cells."""
    p = ranked.values[0].double()
    gap = (ranked.hits[0].double() - p) / ranked.n
    place = (p * _CELLS - 0.5).clamp(0, _CELLS - 1)
    left = place.floor().clamp(max=_CELLS - 2)
    share = place - left
    cells = torch.bincount(left.long(), gap * (1 - share), _CELLS)
    cells += torch.bincount(left.long() + 1, gap * share, _CELLS)
    return torch.fft.rfft(torch.cat([cells, cells.flip(0)]))


@one_thread()
def _fixed_point(cosines: Complex[Tensor, " frequencies"]) -> Float[Tensor, ""]:
    """Where the error of the smoothed gaps, which falls with the width, equals the width."""
    squares = (torch.pi * torch.arange(len(cosines), device=cosines.device, dtype=torch.float64)).square() / 2
    low, high = squares.new_tensor(0.0), squares.new_tensor(1.0)
    for _ in range(_HALVINGS):
        width = (low + high) / 2
        smoothed = torch.fft.irfft(cosines * (-squares * width.square()).exp(), 2 * _CELLS)[:_CELLS]
        low, high = (width, high) if smoothed.abs().sum() > width else (low, width)
    return (low + high) / 2
