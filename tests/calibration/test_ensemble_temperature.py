"""Ensemble temperature scaling: the best mixture on the simplex."""

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given
from hypothesis import strategies as st
from score_sets import generator, log_loss, overconfident

from trimtab.calibration import EnsembleTemperatureScaling, TemperatureScaling


@given(seed=st.integers(0, 10**6), c=st.integers(2, 5), noise=st.sampled_from([0.0, 0.3]), weighted=st.booleans())
def test_no_mixture_is_better(seed, c, noise, weighted):
    logits, labels = overconfident(150, c, seed)
    random = generator(seed)
    wrong = torch.rand(150, generator=random) < noise
    labels = torch.where(wrong, torch.randint(0, c, (150,), generator=random), labels)
    weights = torch.rand(150, generator=random, dtype=torch.float64) + 0.1 if weighted else None
    calibrator = EnsembleTemperatureScaling().fit(logits, labels, weights=weights)
    assert float(calibrator.mixture.sum()) == pytest.approx(1)
    assert calibrator.mixture.min() >= 0
    tempered = TemperatureScaling().fit(logits, labels, weights=weights)
    assert calibrator.temperature == tempered.temperature
    parts = [tempered(logits).exp(), logits.softmax(1), torch.full_like(logits, 1 / c)]
    at_label = torch.stack([part.gather(1, labels[:, None])[:, 0] for part in parts], 1).numpy()
    w = np.ones(150) if weights is None else weights.numpy()

    def loss(x):
        return -np.average(np.log(at_label @ x), weights=w)

    found = calibrator.mixture.numpy()
    slope = -np.average(at_label / (at_label @ found)[:, None], axis=0, weights=w)
    # optimal on the simplex: no part has a steeper descent than those in use
    assert slope.min() >= slope @ found - 1e-5
    peer = scipy.optimize.minimize(
        loss, [1 / 3] * 3, bounds=[(1e-9, 1)] * 3, constraints={"type": "eq", "fun": lambda x: x.sum() - 1}
    )
    assert loss(found) <= peer.fun + 1e-7


def test_the_map_is_the_mixture():
    logits, labels = overconfident(200, 3)
    calibrator = EnsembleTemperatureScaling().fit(logits, labels)
    w = calibrator.mixture
    expected = w[0] * (logits / calibrator.temperature).softmax(1) + w[1] * logits.softmax(1) + w[2] / 3
    assert torch.allclose(calibrator(logits).exp(), expected)


def test_label_noise_is_found():
    random = generator(0)
    truth = 4 * torch.randn(20_000, 4, generator=random, dtype=torch.float64)
    labels = (0.7 * truth.softmax(1) + 0.3 / 4).multinomial(1, generator=random)[:, 0]
    calibrator = EnsembleTemperatureScaling().fit(truth, labels)
    assert log_loss(calibrator(truth), labels) < log_loss(TemperatureScaling().fit(truth, labels)(truth), labels) - 0.02
    assert calibrator.mixture[2] > 0.15
