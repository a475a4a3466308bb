"""Temperature scaling: the optimum, its bounds and what it costs at the door."""

from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given
from hypothesis import strategies as st
from score_sets import log_loss, overconfident

from trimtab.calibration import TemperatureScaling
from trimtab.core.checks import InputError

GOLDEN = Path(__file__).parents[1] / "golden" / "04-ts-limitations"


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


@pytest.mark.golden
@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.npz")), ids=lambda path: path.stem)
def test_the_legacy_fit_stops_where_the_authors_of_04_ts_limitations_stop(path):
    with np.load(path) as arrays:
        logits, labels, expected = (arrays[name] for name in ("ts_logits", "ts_labels", "ts_temperature"))
    found = TemperatureScaling(legacy=True).fit(logits, labels).temperature
    assert float(found) == pytest.approx(expected.item(), abs=1e-5)
    assert float(TemperatureScaling().fit(logits, labels).temperature) > 1.5 * float(found)


@pytest.mark.bad_input
def test_the_legacy_fit_takes_no_weights():
    logits, labels = overconfident(20, 3)
    with pytest.raises(InputError, match="weights must be None with legacy=True"):
        TemperatureScaling(legacy=True).fit(logits, labels, weights=torch.ones(20))
