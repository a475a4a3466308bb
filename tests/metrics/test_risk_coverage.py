"""Risk against coverage: permutations of ties, resamples, and the plain definition."""

import definitions
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab import metrics
from trimtab.metrics import measures
from trimtab.metrics.binning import rank


def test_without_ties_it_is_the_mean_of_running_error_rates():
    p, y = definitions.some_probs(200, 3)
    values, hits = definitions.top(p, y)
    running = np.cumsum(~hits[np.argsort(-values)]) / np.arange(1, 201)
    assert metrics.aurc(p, y) == pytest.approx(running.mean(), abs=1e-12)
    curve = metrics.risk_coverage_curve(p, y)
    np.testing.assert_allclose(curve.risk, running, atol=1e-12)
    np.testing.assert_allclose(curve.coverage, np.arange(1, 201) / 200)


def test_ties_give_the_mean_over_their_orders():
    random = np.random.default_rng(0)
    values = np.array([0.9, 0.9, 0.9, 0.6, 0.6, 0.5, 0.5, 0.5, 0.5])
    hits = np.array([1, 0, 1, 0, 1, 0, 0, 1, 1], dtype=bool)
    p = torch.tensor(np.stack([values, 1 - values], 1))
    y = torch.tensor(np.where(hits, 0, 1))
    assert metrics.aurc(p, y) == pytest.approx(definitions.aurc(values, hits, random, orders=20_000), abs=2e-3)
    assert metrics.risk_coverage_curve(p, y).coverage.tolist() == pytest.approx([3 / 9, 5 / 9, 1])
    assert metrics.risk_coverage_curve(p, y).risk.tolist() == pytest.approx([1 / 3, 2 / 5, 4 / 9])


@given(data=st.data())
def test_weights_are_repetitions(data):
    pairs = data.draw(
        st.lists(st.tuples(st.sampled_from([0.5, 0.75]) | st.floats(0.5, 1), st.booleans()), min_size=1, max_size=30)
    )
    values, hits = (torch.tensor(column) for column in zip(*pairs))
    values, n = values.double(), len(values)
    drawn = torch.tensor(data.draw(st.lists(st.integers(0, n - 1), min_size=n, max_size=n)))
    weights = torch.bincount(drawn, minlength=n)[None].to(torch.uint8)
    weighted = measures.order(rank(values[None], hits[None], weights))
    repeated = measures.order(rank(values[drawn][None], hits[drawn][None]))
    for name in weighted:
        torch.testing.assert_close(weighted[name], repeated[name], equal_nan=True, atol=1e-12, rtol=0)
