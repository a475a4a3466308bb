"""Scores of one class against the rest, and distributions from binary answers."""

import math

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given
from hypothesis import strategies as st
from score_sets import generator, overconfident

from trimtab.calibration import one_vs_rest


@given(seed=st.integers(0, 10**6), c=st.integers(2, 6), factor=st.floats(0.1, 10))
def test_log_odds_by_definition(seed, c, factor):
    logits = factor * torch.randn(7, c, generator=generator(seed), dtype=torch.float64)
    odds = one_vs_rest.log_odds(logits)
    p = logits.softmax(1)
    expected = (p / (1 - p)).log()
    sure = p > 1 - 1e-9  # where the definition itself has no digits left
    assert odds.shape[1] == (1 if c == 2 else c)
    columns = slice(1, None) if c == 2 else slice(None)
    assert torch.allclose(odds[~sure[:, columns]], expected[:, columns][~sure[:, columns]], rtol=1e-6)


def test_log_odds_where_probabilities_round_to_one_and_zero():
    logits = torch.tensor([[0.0, -50.0, -60.0], [500.0, 0.0, 0.0], [1e4, -1e4, 1e4]])
    odds = one_vs_rest.log_odds(logits)
    assert torch.allclose(odds[0], torch.tensor([50 - math.log1p(math.exp(-10)), -50.0, -60.0]))
    assert torch.allclose(odds[1], torch.tensor([500 - math.log(2), -500.0, -500.0]))
    assert torch.allclose(odds[2], torch.tensor([0.0, -2e4 - math.log(2), 0.0]), atol=1e-3)


def test_gradients_of_log_odds_are_finite_where_classes_tie():
    logits = torch.tensor([[1.0, 1.0, 0.0], [1e4, -1e4, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    one_vs_rest.log_odds(logits).sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_log_sigmoid_is_exact_in_both_tails():
    x = torch.linspace(-800, 800, 3201, dtype=torch.float64)
    assert torch.allclose(one_vs_rest.log_sigmoid(x), torch.nn.functional.logsigmoid(x), rtol=1e-14, atol=1e-17)


def test_distributions_sum_to_one():
    odds = 5 * torch.randn(50, 4, generator=generator(0), dtype=torch.float64)
    expected = odds.sigmoid() / odds.sigmoid().sum(1, keepdim=True)
    assert torch.allclose(one_vs_rest.from_log_odds(odds).exp(), expected)
    assert torch.allclose(one_vs_rest.from_probabilities(odds.sigmoid()).exp(), expected)
    single = one_vs_rest.from_log_odds(odds[:, :1]).exp()
    assert torch.allclose(single, torch.stack([1 - odds[:, 0].sigmoid(), odds[:, 0].sigmoid()], 1))


def test_no_class_at_all_is_every_class_alike():
    q = torch.tensor([[0.0, 0.0, 0.0], [0.5, 0.0, 0.5]])
    assert torch.allclose(one_vs_rest.from_probabilities(q).exp(), torch.tensor([[1 / 3] * 3, [0.5, 0.0, 0.5]]))


def test_scores_a_rounding_apart_are_one():
    x = torch.tensor([3.0, 1.0, 1.0 + 2e-7, -5.0, 3.0, 1.001])
    values, order, apart = one_vs_rest.ascending(x)
    assert torch.equal(values, x.sort().values)
    assert torch.equal(x[order], values)
    assert apart.tolist() == [True, False, True, True, False]
    assert not one_vs_rest.ascending(torch.ones(4))[2].any()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bounded", [False, True])
def test_logistic_regressions_side_by_side(weighted, bounded):
    """Against SciPy, problem by problem; the bound bites in some of them."""
    random = generator(3)
    n, k = 300, 4
    features = [torch.randn(n, k, generator=random, dtype=torch.float64) for _ in range(2)]
    outcomes = torch.bernoulli((features[0] - 2 * features[1]).sigmoid(), generator=random)
    weights = torch.rand(n, generator=random, dtype=torch.float64) if weighted else None
    prior = ([1.0, 1.0, 0.0], [2.0, 2.0, 5.0])
    lower = [0.0, 0.0, -math.inf] if bounded else None
    found = one_vs_rest.fit_logistic(features, outcomes, weights, lower=lower, prior=prior)
    w = np.ones(n) if weights is None else weights.numpy()
    for j in range(k):
        f = np.stack([features[0][:, j], features[1][:, j], np.ones(n)], 1)

        def loss(x, f=f, j=j):
            odds = f @ x
            data = np.average(np.logaddexp(0, odds) - outcomes[:, j].numpy() * odds, weights=w)
            return data + (((x - prior[0]) / prior[1]) ** 2).sum() / 2 / w.sum()

        bounds = [(0, None), (0, None), (None, None)] if bounded else None
        best = scipy.optimize.minimize(
            loss, [0.5, 0.5, 0.0], bounds=bounds, method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-9}
        )
        assert loss(found[j].numpy()) <= best.fun + 1e-10
        np.testing.assert_allclose(found[j].numpy(), best.x, atol=1e-4)
    assert not bounded or bool((found[:, 1] == 0).all())


def test_blocks_do_not_matter(monkeypatch):
    logits, labels = overconfident(500, 3)
    odds = one_vs_rest.log_odds(logits)
    whole = one_vs_rest.fit_logistic([odds], one_vs_rest.outcomes(labels, 3), None)
    monkeypatch.setattr(one_vs_rest, "_BLOCK_ELEMENTS", 17)
    assert torch.allclose(one_vs_rest.fit_logistic([odds], one_vs_rest.outcomes(labels, 3), None), whole, atol=1e-9)
