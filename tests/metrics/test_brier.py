"""Brier score: conventions, and a decomposition that adds up."""

import itertools

import definitions
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab import metrics


def test_the_score_is_a_sum_over_classes():
    from sklearn.metrics import brier_score_loss

    p, y = definitions.some_probs(300, 4)
    one_hot = np.eye(4)[y]
    assert metrics.brier_score(p, y) == pytest.approx(((p.numpy() - one_hot) ** 2).sum(1).mean(), rel=1e-12)
    p, y = definitions.some_probs(300, 2)
    assert metrics.brier_score(p, y) == pytest.approx(2 * brier_score_loss(y, p[:, 1].numpy()), rel=1e-9)


def test_confident_truths_keep_their_digits():
    p = torch.tensor([[1 - 1e-4, 1e-4]], dtype=torch.float32)
    exact = (1 - float(p[0, 0])) ** 2 + float(p[0, 1]) ** 2
    assert metrics.brier_score(p, torch.tensor([0])) == pytest.approx(exact, rel=1e-6)


@given(given=definitions.predictions(), bins=st.integers(1, 20))
def test_the_parts_add_up_and_follow_their_definitions(given, bins):
    logits, y = given
    p = logits.softmax(1)
    parts = metrics.brier_decomposition(p, y, bins)
    total = parts.reliability - parts.resolution + parts.uncertainty + parts.within_bins
    assert total == pytest.approx(metrics.brier_score(p, y), abs=1e-12)
    reliability = resolution = uncertainty = within = 0.0
    edges = definitions.equal_width_edges(bins)
    for k in range(p.shape[1]):
        v, h = p[:, k].numpy(), (y == k).numpy().astype(float)
        uncertainty += h.mean() * (1 - h.mean())
        for lower, upper in itertools.pairwise(edges):
            held = (v > lower) & (v <= upper)
            if held.any():
                dv, dh = v[held] - v[held].mean(), h[held] - h[held].mean()
                reliability += held.mean() * (v[held].mean() - h[held].mean()) ** 2
                resolution += held.mean() * (h[held].mean() - h.mean()) ** 2
                within += held.mean() * (dv**2 - 2 * dv * dh).mean()
    assert parts == pytest.approx((reliability, resolution, uncertainty, within), abs=1e-12)
