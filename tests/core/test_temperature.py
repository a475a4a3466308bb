"""The temperature against scipy's minimiser, at the ends of its range, and under weights."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from trimtab.core.temperature import BOUNDS, fit_temperature


def scores(n, c, seed, factor=2.0, dtype=torch.float64):
    random = np.random.default_rng(seed)
    z = random.normal(0, 1.5, size=(n, c))
    labels = (z + random.gumbel(size=z.shape)).argmax(1)
    return torch.from_numpy(factor * z).to(dtype), torch.from_numpy(labels)


def loss(logits, labels, temperature, weights=None):
    log_p = log_softmax(logits.double().numpy() / temperature, axis=1)[np.arange(len(labels)), labels.numpy()]
    return -np.average(log_p, weights=None if weights is None else weights.double().numpy())


def best(logits, labels, weights=None):
    def objective(s):
        return loss(logits, labels, np.exp(-s), weights)

    return minimize_scalar(
        objective, bounds=(-np.log(BOUNDS[1]), -np.log(BOUNDS[0])), method="bounded", options={"xatol": 1e-10}
    )


@given(st.integers(20, 300), st.integers(2, 12), st.integers(0, 10_000), st.floats(0.2, 8))
def test_the_optimum_is_scipys(n, c, seed, factor):
    logits, labels = scores(n, c, seed, factor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        t = fit_temperature(logits, labels)
    wanted = best(logits, labels)
    assert loss(logits, labels, t) <= wanted.fun + 1e-9
    if wanted.fun < np.log(c) - 1e-3 and BOUNDS[0] * 1.01 < t < BOUNDS[1] / 1.01:
        assert t == pytest.approx(np.exp(-wanted.x), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_rows_start_from_a_subsample(dtype):
    logits, labels = scores(50_000, 5, 0, 3.0, dtype)
    t = fit_temperature(logits, labels)
    assert loss(logits, labels, t) <= best(logits, labels).fun + 1e-9
    assert t == pytest.approx(3.0, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    logits, labels = scores(2000, 5, 0, 3.0, dtype)
    assert loss(logits, labels, fit_temperature(logits, labels)) <= best(logits, labels).fun + 1e-6


@given(st.integers(0, 10_000), st.floats(0.3, 5))
def test_the_temperature_scales_with_the_logits_and_ignores_a_shift(seed, factor):
    logits, labels = scores(400, 4, seed)
    t = fit_temperature(logits, labels)
    assert fit_temperature(logits * factor, labels) == pytest.approx(factor * t, rel=1e-6)
    assert fit_temperature(logits + 1000.0, labels) == pytest.approx(t, rel=1e-6)


@given(st.integers(0, 10_000))
def test_integer_weights_are_repeated_rows(seed):
    logits, labels = scores(200, 3, seed)
    times = torch.randint(0, 4, (200,), generator=torch.Generator().manual_seed(seed))
    repeated = fit_temperature(logits.repeat_interleave(times, 0), labels.repeat_interleave(times))
    assert fit_temperature(logits, labels, times.double()) == pytest.approx(repeated, rel=1e-6)


def test_weights_have_no_scale():
    logits, labels = scores(30_000, 3, 0)
    weights = torch.rand(30_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = fit_temperature(logits, labels, weights)
    assert t == pytest.approx(np.exp(-best(logits, labels, weights).x), rel=1e-5)
    for scale in (1e-12, 1e12):
        assert fit_temperature(logits, labels, weights * scale) == pytest.approx(t, rel=1e-6)


@pytest.mark.parametrize("factor", [1e-3, 1.0, 50.0])
def test_always_right_gives_the_sharpest_temperature_that_still_wins_something(factor):
    logits, _ = scores(300, 4, 0)
    logits = logits * factor
    with pytest.warns(RuntimeWarning, match="the best temperature lies outside"):
        t = fit_temperature(logits, logits.argmax(1))
    assert t == BOUNDS[0]


def test_logits_that_mislead_give_the_flattest_temperature():
    logits, _ = scores(400, 4, 0)
    with pytest.warns(RuntimeWarning, match="the best temperature lies outside"):
        assert fit_temperature(logits, logits.argmin(1)) == BOUNDS[1]


def test_constant_logits_leave_the_temperature_at_one():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fit_temperature(torch.full((50, 3), 2.5), torch.arange(50) % 3) == 1.0


def test_huge_logits_stay_finite():
    logits, labels = scores(500, 4, 1)
    t = fit_temperature(logits * 40, labels)
    assert loss(logits * 40, labels, t) <= best(logits * 40, labels).fun + 1e-9


def test_a_pass_limit_is_told():
    logits, labels = scores(500, 4, 1, 30.0)
    with pytest.warns(RuntimeWarning, match="did not converge in 1 passes"):
        fit_temperature(logits, labels, max_passes=1)
