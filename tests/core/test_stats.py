"""Intervals and tests against scipy, and against what they promise."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as reference

from trimtab.core import stats
from trimtab.core.checks import InputError

VALUES = st.lists(st.floats(-100, 100), min_size=2, max_size=12).map(np.array)


def test_counts_are_a_bootstrap():
    counts = stats.resample_counts(40, 3000, seed=1)
    assert counts.shape == (3000, 40)
    assert (counts.sum(1) == 40).all()
    # each count is binomial(40, 1/40): mean 1, variance 39/40
    assert abs(counts.mean(0) - 1).max() < 5 * np.sqrt(39 / 40 / 3000)
    assert abs(counts.var() - 39 / 40) < 0.05
    assert (counts == stats.resample_counts(40, 3000, seed=1)).all()
    assert (counts != stats.resample_counts(40, 3000, seed=2)).any()


@given(st.integers(0, 60), st.integers(0, 60), st.floats(0.01, 0.99))
def test_the_upper_bound_is_the_rate_at_which_so_few_are_unlikely(successes, more, level):
    n = successes + more
    (bound,) = stats.binomial_upper(np.array([float(successes)]), np.array([float(n)]), level)
    if more == 0:
        assert bound == 1
    else:
        assert reference.binom.cdf(successes, n, bound) == pytest.approx(1 - level, abs=1e-9)


def test_the_percentile_interval_is_numpys_quantiles():
    replicates = np.random.default_rng(0).normal(size=999)
    interval = stats.percentile_interval(0.1, replicates, level=0.9)
    assert interval == pytest.approx((0.1, np.quantile(replicates, 0.05), np.quantile(replicates, 0.95)))
    with_gaps = np.insert(replicates, [0, 5, 9], np.nan)
    assert stats.percentile_interval(0.1, with_gaps, level=0.9) == interval
    nothing = stats.percentile_interval(0.1, np.full(3, np.nan))
    assert nothing.estimate == 0.1
    assert np.isnan(nothing[1:]).all()


def test_the_mean_agrees_with_scipys_bootstrap():
    values = np.random.default_rng(3).exponential(size=60)
    ours = stats.bootstrap_mean(values, resamples=20_000, seed=0)
    theirs = reference.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=0).confidence_interval
    width = theirs.high - theirs.low
    assert ours.estimate == values.mean()
    assert ours.low == pytest.approx(theirs.low, abs=0.03 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.03 * width)


def test_the_interval_covers_as_often_as_it_says():
    random = np.random.default_rng(0)
    samples = random.normal(2.0, 1.0, size=(400, 50))
    covered = np.mean(
        [low <= 2 <= high for _, low, high in (stats.bootstrap_mean(s, resamples=500, seed=0) for s in samples)]
    )
    assert 0.90 <= covered <= 0.98


@given(VALUES, st.integers(0, 100))
def test_the_interval_lies_within_the_values(values, seed):
    estimate, low, high = stats.bootstrap_mean(values, resamples=50, seed=seed)
    slack = 1e-9
    assert values.min() - slack <= low <= high <= values.max() + slack
    assert estimate == values.mean()
    assert (estimate, low, high) == stats.bootstrap_mean(values, resamples=50, seed=seed)


def test_large_samples_are_drawn_in_blocks(monkeypatch):
    """Two resamples a block at this size; the number of replicates and the interval do not depend on it."""
    values = np.random.default_rng(0).normal(size=2_000_000)
    interval = stats.bootstrap_mean(values, resamples=5, seed=0)
    assert abs(interval.high - interval.low) < 0.01


@given(st.lists(st.tuples(st.integers(-50, 50), st.integers(-50, 50)), min_size=1, max_size=9))
def test_the_exact_paired_test_counts_all_flips(pairs):
    n = len(pairs)
    a, b = np.array(pairs, dtype=float).T
    ours = stats.paired_test(a, b, seed=0)
    sums = np.array([np.dot(signs, a - b) for signs in itertools.product((-1, 1), repeat=n)])
    assert ours == np.mean(np.abs(sums) >= abs((a - b).sum()))


def test_the_exact_paired_test_against_scipy():
    random = np.random.default_rng(5)
    a, b = random.normal(size=10), random.normal(0.5, size=10)
    theirs = reference.permutation_test(
        (a, b), lambda x, y, axis: np.mean(x - y, axis=axis), permutation_type="samples", n_resamples=np.inf
    )
    assert stats.paired_test(a, b, seed=0) == pytest.approx(theirs.pvalue)


def test_the_random_paired_test_is_near_the_t_test():
    random = np.random.default_rng(5)
    a, b = random.normal(size=200), random.normal(0.12, size=200)
    p = stats.paired_test(a, b, resamples=20_000, seed=0)
    assert p == pytest.approx(reference.ttest_rel(a, b).pvalue, abs=0.02)
    assert p == stats.paired_test(a, b, resamples=20_000, seed=0)
    assert p == pytest.approx(stats.paired_test(b, a, resamples=20_000, seed=0), abs=0.02)


def test_no_difference_is_no_evidence():
    same = np.ones(30)
    assert stats.paired_test(same, same, seed=0) == 1.0
    assert stats.paired_test(same[:4], same[:4], seed=0) == 1.0


@pytest.mark.bad_input
@pytest.mark.parametrize("values", [np.array([]), np.array([1.0, np.nan]), np.array([np.inf]), np.zeros((2, 2))])
def test_values_must_be_a_finite_vector(values):
    with pytest.raises(InputError, match="values must be a non-empty, finite vector, got shape"):
        stats.bootstrap_mean(values, seed=0)
    with pytest.raises(InputError, match="a and b must be finite vectors of equal length"):
        stats.paired_test(values, values, seed=0)


@pytest.mark.bad_input
def test_settings_must_make_sense():
    with pytest.raises(InputError, match=r"level must lie in \(0, 1\), got 95"):
        stats.bootstrap_mean(np.ones(3), level=95, seed=0)
    with pytest.raises(InputError, match="resamples must be at least 1, got 0"):
        stats.bootstrap_mean(np.ones(3), resamples=0, seed=0)
    with pytest.raises(InputError, match="resamples must be at least 1, got 0"):
        stats.resample_counts(3, 0, seed=0)
    with pytest.raises(InputError, match="a and b must be finite vectors of equal length"):
        stats.paired_test(np.ones(3), np.ones(2), seed=0)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (0, 2), (5, 0), (3, 9), (40, 10)])
def test_a_paired_share_agrees_with_the_exact_test(gained, lost):
    before = np.zeros(100, dtype=bool)
    after = before.copy()
    after[:gained] = True
    before[gained : gained + lost] = True
    change = stats.paired_share(before, after)
    assert change.estimate == pytest.approx((gained - lost) / 100)
    assert change.low <= change.estimate <= change.high
    if gained + lost:
        significant = reference.binomtest(gained, gained + lost).pvalue < 0.05
        assert significant == (change.low > 0 or change.high < 0)
