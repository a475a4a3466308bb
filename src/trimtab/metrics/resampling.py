"""Intervals around measures from their values on resamples or on subsets of the rows.

Errors that add up absolute values are larger in every resample than in the sample: the resample adds its own noise to
each bin. So the replicates are moved to have the estimate as their mean before their quantiles are taken. The interval
tells how much the measure would vary from sample to sample; it does not take back the upward bias that a measure with
many bins has in the sample itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from trimtab.core import checks, stats
from trimtab.core.stats import Interval

_HIGHEST = {"NLL": math.inf, "log_loss": math.inf, "Brier": 2.0, "brier": 2.0}


def weights(n: int, resamples: int, seed: int, device: torch.device) -> UInt8[Tensor, "r n"]:
    """How often each sample counts in each bootstrap resample."""
    checks.integer(seed, "seed", low=0)
    return torch.from_numpy(stats.resample_counts(n, resamples, seed)).to(device)


def intervals(
    estimates: Mapping[str, Tensor], replicates: Mapping[str, Tensor], level: float, scale: float = 1.0
) -> dict[str, Interval]:
    """Centred percentile intervals, kept inside the measures' range.

    Args:
        estimates: one-element tensors by name.
        replicates: the values on the resamples under the same names.
        level: coverage.
        scale: what deviations are multiplied with: sqrt(b / n) where the replicates come from subsets of b rows.
    """
    return {
        name: _clamped(name, _centred(float(value), replicates[name].cpu().numpy(), level, scale))
        for name, value in estimates.items()
    }


def changes(
    before: Sequence[Mapping[str, Tensor]], after: Sequence[Mapping[str, Tensor]], level: float
) -> dict[str, Interval]:
    """Centred percentile intervals of after - before, each given as [estimates, replicates on the same resamples]."""
    return {
        name: _centred(float(after[0][name] - before[0][name]), (after[1][name] - before[1][name]).cpu().numpy(), level)
        for name in before[0]
    }


def _centred(estimate: float, replicates: np.ndarray, level: float, scale: float = 1.0) -> Interval:
    known = replicates[np.isfinite(replicates)]
    if not len(known) or not math.isfinite(estimate):
        return Interval(estimate, math.nan, math.nan)
    return stats.percentile_interval(estimate, estimate + (known - known.mean()) * scale, level)


def _clamped(name: str, interval: Interval) -> Interval:
    """The interval inside the measure's range, and around its estimate."""
    estimate, low, high = interval
    if math.isnan(low):
        return interval
    highest = _HIGHEST.get(name.rpartition("_")[2] if name.startswith(("pre_", "post_")) else name, 1.0)
    return Interval(estimate, min(max(low, 0.0), estimate), max(min(high, highest), estimate))


def bootstrap_sentence(resamples: int) -> str:
    """How bootstrap intervals were made, for a report."""
    return (
        f"Intervals are bootstrap intervals from {resamples} resamples of the rows, centred at the estimate; "
        "that of the accuracy is exact (Clopper and Pearson)."
    )


def subsampling_sentence(subsets: int, size: int) -> str:
    """How subsampling intervals were made, for a report."""
    return (
        f"Intervals are by subsampling (Politis, Romano and Wolf): every measure on {subsets} random disjoint subsets "
        f"of {size} rows, deviations scaled by the square root of {size} over the number of rows; "
        "that of the accuracy is exact (Clopper and Pearson)."
    )
