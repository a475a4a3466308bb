"""Beta calibration: the constrained optimum, and the maps that it holds."""

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given
from hypothesis import strategies as st
from score_sets import generator, overconfident
from sklearn.linear_model import LogisticRegression

from trimtab.calibration import BetaCalibration
from trimtab.core.checks import InputError


def plain():
    return BetaCalibration(slope_sd=None, bias_sd=None)


@given(seed=st.integers(0, 10**6), direction=st.sampled_from([1.0, -1.0]), n=st.integers(30, 200))
def test_no_map_of_the_family_is_better(seed, direction, n):
    logits, labels = overconfident(n, 2, seed, factor=0.5 * direction)
    calibrator = plain().fit(logits, labels)
    log_p = logits.log_softmax(1).numpy()
    y = labels.numpy()

    def loss(x):
        odds = x[0] * log_p[:, 1] - x[1] * log_p[:, 0] + x[2]
        return (np.logaddexp(0, odds) - y * odds).mean()

    bounds = [(0, None), (0, None), (None, None)]
    best = scipy.optimize.minimize(loss, [1.0, 1.0, 0.0], bounds=bounds, options={"ftol": 1e-15, "gtol": 1e-9})
    found = [float(x) for x in (calibrator.a, calibrator.b, calibrator.bias)]
    assert min(found[:2]) >= 0
    assert loss(found) <= best.fun + 1e-9


def test_without_binding_bounds_it_is_logistic_regression():
    logits, labels = overconfident(600, 2)
    log_p = logits.log_softmax(1)
    features = torch.stack([log_p[:, 1], -log_p[:, 0]], 1).numpy()
    peer = LogisticRegression(C=torch.inf, tol=1e-10, max_iter=1000).fit(features, labels.numpy())
    assert peer.coef_.min() > 0
    calibrator = plain().fit(logits, labels)
    assert [float(calibrator.a), float(calibrator.b)] == pytest.approx(peer.coef_[0].tolist(), abs=1e-4)


def test_a_slope_that_would_be_negative_is_zero():
    """Likely outcomes fail more often the surer the model is: the map may be flat there, but not fall."""
    random = generator(0)
    p = torch.rand(4000, generator=random, dtype=torch.float64)
    labels = torch.bernoulli(0.8 - 0.3 * p, generator=random).long()
    calibrator = plain().fit(torch.stack([1 - p, p], 1).log(), labels)
    assert float(calibrator.a) == float(calibrator.b) == 0
    assert torch.allclose(calibrator.bias.sigmoid(), labels.double().mean(), atol=1e-6)


def test_it_holds_the_identity():
    random = generator(0)
    p = torch.rand(200_000, generator=random, dtype=torch.float64)
    logits = torch.stack([1 - p, p], 1).log()
    calibrator = plain().fit(logits, torch.bernoulli(p, generator=random).long())
    assert [float(calibrator.a), float(calibrator.b), float(calibrator.bias)] == pytest.approx([1, 1, 0], abs=0.03)


@pytest.mark.parametrize("c", [2, 4])
def test_it_is_monotone_in_every_class(c):
    logits, labels = overconfident(500, c, factor=3.0)
    calibrator = BetaCalibration().fit(logits, labels)
    line = torch.zeros(200, c, dtype=torch.float64)
    line[:, 1] = torch.linspace(-30, 30, 200)
    assert (calibrator(line)[:, 1].diff() >= 0).all()


@pytest.mark.bad_input
@pytest.mark.parametrize("name", ["slope_sd", "bias_sd"])
def test_bad_arguments(name):
    with pytest.raises(InputError, match=rf"{name} must lie in \(0, inf\), got 0"):
        BetaCalibration(**{name: 0})
