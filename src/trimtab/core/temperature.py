"""The one-parameter maximum-likelihood problem that measuring and calibrating share: a temperature for logits."""

from __future__ import annotations

import math
import warnings

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.core.progress import in_time

BOUNDS = (1e-2, 1e2)
_BLOCK_ELEMENTS = 1 << 17
_SUBSAMPLE = 2000
_FLAT = 1e-13  # mean loss that can still be won: none to speak of


def fit_temperature(
    logits: Float[Tensor, "n c"],
    labels: Int[Tensor, " n"],
    weights: Float[Tensor, " n"] | None = None,
    *,
    tolerance: float = 5e-4,
    max_passes: int = 50,
) -> float:
    """The temperature T that minimises the mean log loss of softmax(logits / T).

    The loss is convex in s = 1/T. Safeguarded Newton steps in s find the optimum on a systematic subsample first, so
    that two or three passes over all rows remain; each pass runs over blocks that stay in the cache, in single
    precision, with sums in float64.

    Args:
        logits: (n, c), finite.
        labels: (n,), in 0..c-1.
        weights: sample weights (n,), >= 0.
        tolerance: the last Newton step changes s by less than this share of s; the error that it leaves is of the order
            of the square, which costs some 1e-13 of log loss.
        max_passes: give up after this many passes.

    Returns:
        T in `BOUNDS`; at a bound, with a warning, where the optimum lies outside (all labels the top logit: T -> 0;
        logits without information: T -> infinity).
    """
    n = logits.shape[0]
    s = 1.0
    if n > 10 * _SUBSAMPLE:
        chosen = slice(None, None, n // _SUBSAMPLE)
        s, _ = _minimise(
            logits[chosen], labels[chosen], None if weights is None else weights[chosen], s, 1e-2, max_passes
        )
    s, converged = _minimise(logits, labels, weights, s, tolerance, max_passes)
    if not converged:
        warnings.warn(f"the temperature did not converge in {max_passes} passes", RuntimeWarning, stacklevel=2)
    if not 1 / BOUNDS[1] < s < 1 / BOUNDS[0]:
        warnings.warn(f"the best temperature lies outside {BOUNDS}: {1 / s:g} is used", RuntimeWarning, stacklevel=2)
    return 1 / s


def _minimise(
    logits: Tensor, labels: Tensor, weights: Tensor | None, s: float, tolerance: float, max_passes: int
) -> tuple[float, bool]:
    """Newton's method in s inside a bracket that every slope narrows; bisection where a step would leave it."""
    smallest, largest = 1 / BOUNDS[1], 1 / BOUNDS[0]
    low, high = 0.0, math.inf
    mass = len(labels) if weights is None else float(weights.sum(dtype=torch.float64))
    for _ in range(max_passes):
        in_time()
        slope, curvature = _derivatives(logits, labels, weights, s)
        if slope > 0:
            high = s
        else:
            low = s
        if slope == 0 or (s == smallest and slope > 0) or (s == largest and slope < 0):
            return s, True
        newton = s - slope / curvature if curvature > 0 else -math.copysign(math.inf, slope)
        target = min(max(newton, smallest), largest)
        if abs(target - s) <= tolerance * s:
            return target, True
        if abs(slope) * s <= _FLAT * mass:
            return (largest if slope < 0 else smallest), True
        s = target if low < target < high else math.sqrt(low * high)
    return s, False


def _derivatives(logits: Tensor, labels: Tensor, weights: Tensor | None, s: float) -> tuple[float, float]:
    """Slope and curvature in s of the summed loss: E_p[z] - z_y and Var_p[z], added over the rows."""
    n, c = logits.shape
    rows = max(1, _BLOCK_ELEMENTS // c)
    single = torch.float32
    total, first, second, own = torch.empty(4, n, dtype=single, device=logits.device)
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        z = logits[part]
        z = (z - z.amax(1, keepdim=True)).to(single)
        if logits.dtype == torch.float64:
            z.clamp_(min=torch.finfo(single).min)
        own[part] = z.gather(1, labels[part, None])[:, 0]
        e = (z * s).exp_()
        torch.sum(e, 1, out=total[part])
        e *= z
        torch.sum(e, 1, out=first[part])
        torch.linalg.vecdot(e, z, out=second[part])
    mean = first.div_(total)
    gap, variance = mean - own, second.div_(total).sub_(mean * mean)
    if weights is not None:
        gap, variance = gap * weights, variance * weights
    return float(gap.sum(dtype=torch.float64)), float(variance.sum(dtype=torch.float64))
