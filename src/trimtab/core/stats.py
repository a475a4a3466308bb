"""Uncertainty of what was measured: bootstrap intervals and paired tests, vectorised over the resamples."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8
from scipy.special import betaincinv

from trimtab.core import checks
from trimtab.core.checks import InputError


class Interval(NamedTuple):
    """An estimate and the two ends of its confidence interval."""

    estimate: float
    low: float
    high: float


def resample_counts(n: int, resamples: int, seed: int) -> UInt8[np.ndarray, "resamples n"]:
    """How often each of n samples is drawn in each bootstrap resample: multinomial counts, every row sums to n.

    A byte holds a count: one above 255 has a chance below 1e-500.
    """
    checks.integer(n, "n", low=1)
    checks.integer(resamples, "resamples", low=1)
    random = np.random.default_rng(seed)
    counts = np.empty((resamples, n), dtype=np.uint8)
    for row in counts:
        row[:] = np.bincount(random.integers(0, n, size=n), minlength=n)
    return counts


def percentile_interval(estimate: float, replicates: Float[np.ndarray, " resamples"], level: float = 0.95) -> Interval:
    """The percentile interval of bootstrap replicates, ignoring replicates that are NaN."""
    checks.number(level, "level", low=0, high=1, low_open=True, high_open=True)
    known = replicates[~np.isnan(replicates)]
    if not len(known):
        return Interval(estimate, float("nan"), float("nan"))
    low, high = np.quantile(known, ((1 - level) / 2, (1 + level) / 2))
    return Interval(estimate, float(low), float(high))


def binomial_interval(
    successes: Float[np.ndarray, " k"], trials: Float[np.ndarray, " k"], level: float = 0.95
) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """Clopper and Pearson's exact interval for each of k proportions, as (lows, highs).

    Example:
        >>> import numpy as np
        >>> low, high = binomial_interval(np.array([0.0]), np.array([10.0]))
        >>> float(low[0]), round(float(high[0]), 4)
        (0.0, 0.3085)
    """
    checks.number(level, "level", low=0, high=1, low_open=True, high_open=True)
    tail = (1 - level) / 2
    with np.errstate(invalid="ignore"):
        low = np.where(successes == 0, 0.0, betaincinv(successes, trials - successes + 1, tail))
        high = np.where(successes == trials, 1.0, betaincinv(successes + 1, trials - successes, 1 - tail))
    return low, high


def binomial_upper(
    successes: Float[np.ndarray, " k"], trials: Float[np.ndarray, " k"], level: float = 0.95
) -> Float[np.ndarray, " k"]:
    """Clopper and Pearson's exact one-sided upper bound for each of k proportions; 1 where there are no trials.

    Example:
        >>> import numpy as np
        >>> round(float(binomial_upper(np.array([0.0]), np.array([10.0]))[0]), 4)
        0.2589
    """
    checks.number(level, "level", low=0, high=1, low_open=True, high_open=True)
    with np.errstate(invalid="ignore"):
        return np.where(successes == trials, 1.0, betaincinv(successes + 1, trials - successes, level))


def bootstrap_mean(
    values: Float[np.ndarray, " n"], *, resamples: int = 2000, level: float = 0.95, seed: int
) -> Interval:
    """Mean of independent values with its percentile bootstrap interval.

    Example:
        >>> import numpy as np
        >>> low_to_high = bootstrap_mean(np.array([1.0, 2.0, 3.0]), seed=0)
        >>> low_to_high.low < low_to_high.estimate < low_to_high.high
        True
    """
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all():
        raise InputError(f"values must be a non-empty, finite vector, got shape {values.shape}")
    checks.integer(resamples, "resamples", low=1)
    random = np.random.default_rng(seed)
    block = max(1, 4_000_000 // len(values))
    means = [
        values[random.integers(0, len(values), size=(min(block, resamples - start), len(values)))].mean(1)
        for start in range(0, resamples, block)
    ]
    return percentile_interval(float(values.mean()), np.concatenate(means), level)


def paired_share(before: Bool[np.ndarray, " n"], after: Bool[np.ndarray, " n"], *, level: float = 0.95) -> Interval:
    """How much the share of true values changes from `before` to `after`, on the same items.

    The interval is exact (Clopper and Pearson 1934) for the share of gains among the items that changed, as in
    McNemar's test, given how many did: with few of them it is as wide as it must be.

    Example:
        >>> import numpy as np
        >>> before, after = np.ones(500, dtype=bool), np.arange(500) >= 2
        >>> change = paired_share(before, after)
        >>> change.estimate, change.low < 0 < change.high
        (-0.004, True)
    """
    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    changed = gained + lost
    if changed == 0:
        return Interval(0.0, 0.0, 0.0)
    ends = binomial_interval(np.array([float(gained)]), np.array([float(changed)]), level)
    low, high = (changed / len(before) * (2 * float(end[0]) - 1) for end in ends)
    return Interval((gained - lost) / len(before), low, high)


def paired_test(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"], *, resamples: int = 9999, seed: int) -> float:
    """Two-sided p-value of a paired sign-flip permutation test of mean(a - b) = 0.

    All 2^n flips are used when there are at most `resamples` of them, random ones otherwise.

    Example:
        >>> import numpy as np
        >>> paired_test(np.arange(6.0) + 1, np.arange(6.0), seed=0)
        0.03125
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.ndim != 1 or a.shape != b.shape or len(a) == 0 or not (np.isfinite(a) & np.isfinite(b)).all():
        raise InputError(f"a and b must be finite vectors of equal length >= 1, got shapes {a.shape} and {b.shape}")
    checks.integer(resamples, "resamples", low=1)
    difference = a - b
    n = len(difference)
    observed = abs(difference.sum()) * (1 - 1e-12)
    if 2**n <= resamples:
        signs = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        return float((np.abs(signs @ difference) >= observed).mean())
    random = np.random.default_rng(seed)
    block = max(1, 8_000_000 // n)
    extreme = 0
    for start in range(0, resamples, block):
        signs = random.integers(0, 2, size=(min(block, resamples - start), n), dtype=np.int8) * 2.0 - 1.0
        extreme += int((np.abs(signs @ difference) >= observed).sum())
    return (extreme + 1) / (resamples + 1)
