"""Temperature scaling: the optimum, its bounds and what it costs at the door."""

import pytest
import scipy.optimize
import torch
from hypothesis import given
from hypothesis import strategies as st
from score_sets import log_loss, overconfident

from trimtab.calibration import TemperatureScaling


@given(seed=st.integers(0, 10**6), n=st.integers(20, 300), c=st.integers(2, 8), weighted=st.booleans())
def test_no_temperature_is_better(seed, n, c, weighted):
    logits, labels = overconfident(n, c, seed)
    weights = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.01
    weights = weights if weighted else None
    calibrator = TemperatureScaling().fit(logits, labels, weights=weights)

    def loss(s):
        return log_loss((s * logits).log_softmax(1), labels, weights)

    best = scipy.optimize.minimize_scalar(loss, bounds=(1e-2, 1e2), method="bounded", options={"xatol": 1e-10})
    assert loss(1 / float(calibrator.temperature)) <= best.fun + 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_optimum_of_a_large_set(dtype):
    logits, labels = overconfident(30_000, 6, dtype=dtype)
    found = 1 / float(TemperatureScaling().fit(logits, labels).temperature)

    def loss(s):
        return log_loss((s * logits.double()).log_softmax(1), labels)

    best = scipy.optimize.minimize_scalar(loss, bounds=(0.1, 10), method="bounded", options={"xatol": 1e-10})
    assert loss(found) <= best.fun + 1e-9


def test_logits_beyond_single_precision():
    logits, labels = overconfident(200, 4)
    labels = labels.clamp(max=2)
    beyond = logits.masked_fill(torch.arange(4) == 3, -1e300)
    same = logits.masked_fill(torch.arange(4) == 3, -1e6)
    assert TemperatureScaling().fit(beyond, labels).temperature == TemperatureScaling().fit(same, labels).temperature


def test_at_the_bounds_it_says_so():
    labels = torch.tensor([0, 1, 2, 0])
    right = 3.0 * torch.eye(3)[labels]
    with pytest.warns(RuntimeWarning, match=r"the best temperature lies outside \(0.01, 100.0\): 0.01 is used"):
        calibrator = TemperatureScaling().fit(right, labels)
    assert float(calibrator.temperature) == pytest.approx(0.01)
    with pytest.warns(RuntimeWarning, match="100 is used"):
        calibrator = TemperatureScaling().fit(-right, labels)
    assert float(calibrator.temperature) == pytest.approx(100)


def test_it_divides():
    logits, labels = overconfident(100, 3)
    calibrator = TemperatureScaling().fit(logits, labels)
    assert torch.equal(calibrator(logits), (logits / calibrator.temperature).log_softmax(1))
    assert calibrator.temperature.dtype == torch.float64
    assert TemperatureScaling().fit(logits.float(), labels).temperature.dtype == torch.float32
