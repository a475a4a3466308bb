"""Isotonic calibration against scikit-learn, at ties and at the ends."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from score_sets import generator, overconfident
from sklearn.isotonic import IsotonicRegression

from trimtab.calibration import IsotonicCalibration, one_vs_rest


def peer(odds, hits, weights=None):
    return IsotonicRegression(out_of_bounds="clip").fit(odds, hits, sample_weight=weights)


@given(
    seed=st.integers(0, 10**6), n=st.integers(5, 200), c=st.integers(2, 4), ties=st.booleans(), weighted=st.booleans()
)
def test_as_in_scikit_learn(seed, n, c, ties, weighted):
    logits, labels = overconfident(n, c, seed)
    unseen = overconfident(50, c, seed + 1, factor=4.0)[0]
    if ties:
        logits, unseen = logits.round(), unseen.round()
    weights = torch.rand(n, generator=generator(seed), dtype=torch.float64) + 0.1 if weighted else None
    calibrator = IsotonicCalibration(allow_zero=True).fit(logits, labels, weights=weights)
    fit_odds = one_vs_rest.log_odds(logits).numpy().round(9)  # scores a rounding apart tie
    w = None if weights is None else weights.numpy()
    for x in (logits, unseen):
        odds = one_vs_rest.log_odds(x).numpy()
        hits = [labels == 1] if c == 2 else [labels == k for k in range(c)]
        q = np.stack([peer(fit_odds[:, k], h.numpy(), w).predict(odds[:, k]) for k, h in enumerate(hits)], 1)
        if c == 2:
            expected = np.concatenate([1 - q, q], 1)
        else:
            total = q.sum(1, keepdims=True)
            expected = np.where(total > 0, q / np.where(total > 0, total, 1), 1 / c)
        np.testing.assert_allclose(calibrator(x).exp().numpy(), expected, atol=1e-6)


@given(seed=st.integers(0, 10**6), n=st.integers(4, 100), c=st.integers(2, 5), factor=st.floats(0.5, 50))
def test_no_class_is_impossible_unless_asked(seed, n, c, factor):
    logits, labels = overconfident(n, c, seed, factor=factor)
    calibrator = IsotonicCalibration().fit(logits, labels)
    q = calibrator.values
    assert q.min() >= (1 / c) / (n + 1) - 1e-12
    assert q.max() <= (n + 1 / c) / (n + 1) + 1e-12
    assert torch.isfinite(calibrator(1e4 * torch.randn(20, c, generator=generator(seed), dtype=torch.float64))).all()


def test_the_ends_by_hand():
    scores = torch.arange(10).double()
    logits = torch.stack([0 * scores, scores], 1)
    labels = (scores >= 6).long()
    q = IsotonicCalibration().fit(logits, labels).predict_proba(logits)[:, 1]
    assert torch.allclose(q[:6], torch.tensor(0.5 / 7).double())
    assert torch.allclose(q[6:], torch.tensor(4.5 / 5).double())
    zero = IsotonicCalibration(allow_zero=True).fit(logits, labels).predict_proba(logits)[:, 1]
    assert torch.equal(zero, labels.double())


def test_between_two_blocks_it_is_linear_in_the_log_odds_and_beyond_the_ends_flat():
    odds = torch.tensor([-2.0, -1.0, 1.0, 3.0]).double()
    labels = torch.tensor([0, 1, 0, 1])
    calibrator = IsotonicCalibration(allow_zero=True).fit(torch.stack([-odds / 2, odds / 2], 1), labels)
    x = torch.tensor([-9.0, -2.0, -1.5, -1.0, 0.0, 1.0, 2.0, 3.0, 9.0]).double()
    q = calibrator.predict_proba(torch.stack([-x / 2, x / 2], 1))[:, 1]
    assert torch.allclose(q, torch.tensor([0, 0, 0.25, 0.5, 0.5, 0.5, 0.75, 1, 1]).double(), atol=1e-12)


def test_tied_scores_get_one_answer_whatever_their_order():
    logits = torch.tensor([[0.0, 1.0]] * 10 + [[0.0, 2.0]] * 10)
    labels = torch.tensor([1, 0] * 5 + [1] * 9 + [0])
    for order in (torch.arange(20), torch.arange(20).flip(0), labels.argsort(), labels.argsort(descending=True)):
        q = IsotonicCalibration(allow_zero=True).fit(logits[order], labels[order]).predict_proba(logits)[:, 1]
        assert q[0] == pytest.approx(0.5)
        assert q[-1] == pytest.approx(0.9)


def test_it_is_monotone():
    logits, labels = overconfident(400, 3)
    calibrator = IsotonicCalibration().fit(logits, labels)
    assert (calibrator.knots.diff(dim=1) >= 0).all()
    assert (calibrator.values.diff(dim=1) >= 0).all()


def test_a_gradient_flows_through_the_slopes():
    logits, labels = overconfident(400, 3)
    calibrator = IsotonicCalibration().fit(logits, labels)
    x = overconfident(50, 3, seed=1)[0].requires_grad_()
    calibrator(x)[:, 0].sum().backward()
    assert torch.isfinite(x.grad).all()
    assert x.grad.abs().max() > 0
