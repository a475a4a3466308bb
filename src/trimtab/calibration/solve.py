"""Two solvers for the smooth convex problems of this stage: damped Newton for few parameters, L-BFGS for many.

Both stop when the loss that is still to be won, estimated by the Newton decrement, is negligible: a test that does not
depend on how the parameters are scaled.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import scipy.optimize
import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.core.progress import in_time

Quadratic = tuple[Tensor, Tensor, Tensor]  # loss (b,), gradient (b, d), Hessian (b, d, d)

TOLERANCE = 1e-12  # mean log loss that may be left to win
LARGE_TOLERANCE = 1e-10  # the same for L-BFGS


def newton(
    objective: Callable[[Tensor], Quadratic],
    start: Float[Tensor, "b d"],
    *,
    lower: Float[Tensor, " d"] | None = None,
    max_iterations: int = 200,
) -> Float[Tensor, "b d"]:
    """Minimise b convex functions of d variables each, side by side, by damped Newton steps.

    The damping is Levenberg's, on variables scaled by the Hessian's diagonal: zero as long as the steps win what the
    quadratic model promises, so that the last steps converge quadratically. Variables that lie on their lower bound
    and would leave it are held for the step (Bertsekas 1982).

    Args:
        objective: maps (b, d) variables to the losses (b,), gradients (b, d) and Hessians (b, d, d).
        start: where to begin, float64, within the bounds.
        lower: lower bounds of the variables; none by default.
        max_iterations: evaluations of `objective` at most; a RuntimeWarning says when they did not suffice.
    """
    floor = torch.full_like(start[0], -torch.inf) if lower is None else lower.to(start)
    x = start
    loss, gradient, hessian = objective(x)
    damping = torch.zeros_like(loss)
    for _ in range(max_iterations):
        in_time()
        held = (x <= floor) & (gradient > 0)
        slope = gradient.masked_fill(held, 0)
        step, solved = _damped_step(slope, hessian, held, damping)
        done = solved & ((slope * step).sum(1) / 2 * (1 + damping) <= TOLERANCE * (1 + loss.abs()))
        if bool(done.all()):
            return x
        trial = torch.maximum(x - step, floor)
        new_loss, new_gradient, new_hessian = objective(trial)
        promised = (slope * (x - trial)).sum(1)
        better = ~done & solved & (new_loss <= loss - 1e-4 * promised + 1e-15 * loss.abs())
        x = torch.where(better[:, None], trial, x)
        loss = torch.where(better, new_loss, loss)
        gradient = torch.where(better[:, None], new_gradient, gradient)
        hessian = torch.where(better[:, None, None], new_hessian, hessian)
        relaxed = torch.where(damping > 1e-6, damping / 10, 0)
        damping = torch.where(done, damping, torch.where(better, relaxed, (10 * damping).clamp(min=1e-3)))
    warnings.warn(f"Newton's method did not converge in {max_iterations} iterations", RuntimeWarning, stacklevel=3)
    return x


def _damped_step(slope: Tensor, hessian: Tensor, held: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """The step (b, d) that solves (H + damping diag(H)) step = slope over the variables not held, and where it did."""
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    scale = diagonal.clamp(min=1e-200).rsqrt().masked_fill(held, 0)
    scaled = hessian * scale[:, :, None] * scale[:, None, :]
    scaled.diagonal(dim1=1, dim2=2).add_(held.to(scaled.dtype) + damping[:, None] + 1e-13)
    factor, info = torch.linalg.cholesky_ex(scaled)
    step = torch.cholesky_solve((slope * scale)[:, :, None], factor)[:, :, 0] * scale
    solved = (info == 0) & torch.isfinite(step).all(1)
    return step.masked_fill(~solved[:, None], 0), solved


def lbfgs(
    objective: Callable[[Tensor], tuple[Tensor, Tensor]],
    start: Float[Tensor, " d"],
    scale: Float[Tensor, " d"],
    *,
    tolerance: float = LARGE_TOLERANCE,
    max_iterations: int = 2000,
) -> Float[Tensor, " d"]:
    """Minimise one convex function of many variables by L-BFGS (SciPy's) in float64.

    Args:
        objective: maps (d,) variables to the loss and its gradient (d,).
        start: where to begin.
        scale: curvature of the loss along each variable, of the right order: the search runs in variables multiplied
            by its square root.
        tolerance: how much loss may be left to win.
        max_iterations: a RuntimeWarning says when they did not suffice.
    """
    root = scale.double().clamp(min=1e-10 * float(scale.max())).sqrt().cpu()
    left = np.inf

    def scaled(u: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal left
        loss, gradient = objective((torch.from_numpy(u) / root).to(start))
        slope = (gradient.double().cpu() / root).numpy()
        left = slope @ slope / 2
        return float(loss), slope

    def stop(_: np.ndarray) -> None:
        in_time()
        if left <= tolerance:
            raise StopIteration

    found = scipy.optimize.minimize(
        scaled,
        (start.double().cpu() * root).numpy(),
        jac=True,
        method="L-BFGS-B",
        callback=stop,
        options={"maxiter": max_iterations, "maxfun": 2 * max_iterations, "maxcor": 20, "ftol": 0.0, "gtol": 0.0},
    )
    if not found.jac @ found.jac / 2 <= tolerance:
        warnings.warn(f"L-BFGS did not converge in {found.nit} iterations", RuntimeWarning, stacklevel=3)
    return (torch.from_numpy(found.x) / root).to(start)
