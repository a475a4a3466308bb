"""What the measures of predicted means and standard deviations share: the door, the state, and bins of the spread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from trimtab.core import checks
from trimtab.core.checks import InputError

Values = Float[Tensor, " n"] | Float[np.ndarray, " n"]


def vector(value: Any, name: str, n: int | None = None) -> Float[Tensor, " n"]:
    """A finite floating-point vector, of `n` entries where that is given, in float64."""
    x = checks.tensor(value, name).detach()
    if x.ndim != 1 or not x.is_floating_point() or len(x) == 0:
        raise InputError(f"{name} must be floating point of shape (n,), n >= 1, got {x.dtype} {tuple(x.shape)}")
    if n is not None and len(x) != n:
        raise InputError(f"{name} must have {n} entries, got {len(x)}")
    return checks.finite(x, name).double()


def open_levels(levels: Sequence[float]) -> tuple[float, ...]:
    """Probabilities strictly between 0 and 1, at least one."""
    if np.ndim(levels) != 1 or len(levels) == 0:
        raise InputError(f"levels must be a sequence of at least one probability, got {levels!r}")
    return tuple(
        checks.number(q, f"levels[{i}]", low=0, high=1, low_open=True, high_open=True) for i, q in enumerate(levels)
    )


class GaussianMetric(Metric):
    """Keeps every prediction's standard deviation and error; a measure adds `compute`."""

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    std: list[Tensor]
    error: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("std", [], dist_reduce_fx="cat")
        self.add_state("error", [], dist_reduce_fx="cat")

    def update(self, mean: Values, std: Values, targets: Values) -> None:
        """Add a batch: predicted means and standard deviations > 0, and what came, each (n,)."""
        m = vector(mean, "mean")
        s, y = (vector(x, name, len(m)).to(m.device) for x, name in ((std, "std"), (targets, "targets")))
        if bool((s <= 0).any()):
            raise InputError(f"std must be > 0, found {s[s <= 0][0].item():.6g} at {checks.first_bad(s <= 0)}")
        self.std.append(s)
        self.error.append(y - m)

    def _all(self) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Standard deviations and errors of all batches together."""
        return dim_zero_cat(self.std), dim_zero_cat(self.error)


def bin_of(spread: Float[Tensor, " n"], bins: int, equal_mass: bool = False) -> Int[Tensor, " n"]:
    """The bin, 0..bins-1, of every spread: bins (lower, upper] of equal width from the smallest to the largest.

    With `equal_mass` they hold equally many samples, as far as ties, which stay together, allow.
    """
    if equal_mass:
        at = (torch.arange(1, bins, device=spread.device) * len(spread) - 1) // bins
        edges = spread.sort().values[at]
    else:
        steps = torch.arange(1, bins, dtype=spread.dtype, device=spread.device) / bins
        edges = torch.lerp(spread.min(), spread.max(), steps)
    return torch.bucketize(spread, edges)


def bin_means(index: Int[Tensor, " n"], bins: int, *values: Float[Tensor, " n"]) -> list[Float[Tensor, " held"]]:
    """Samples of the bins that hold one, and the means of each of `values` there."""
    samples = torch.bincount(index, minlength=bins)
    held = samples > 0
    return [samples[held].double(), *(torch.bincount(index, x, bins)[held] / samples[held] for x in values)]
