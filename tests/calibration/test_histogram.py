"""Histogram binning by counting."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from score_sets import generator, overconfident

from trimtab.calibration import HistogramBinning, one_vs_rest
from trimtab.core.checks import InputError


def counted(calibrator, odds, hits, weights, prior):
    """Every class's smoothed share of hits at each row, by plain counting in the calibrator's bins."""
    out = np.zeros(odds.shape)
    for k in range(odds.shape[1]):
        edges = calibrator.edges[k].numpy()
        index = (odds[:, k, None] > edges).sum(1)
        for i in np.unique(index):
            rows = index == i
            mass, hit = weights[rows].sum(), (weights * hits[:, k])[rows].sum()
            out[rows, k] = (hit + prior) / (mass + 1) if prior else hit / mass
    return out


@given(
    seed=st.integers(0, 10**6), n=st.integers(5, 200), c=st.integers(2, 4), bins=st.integers(1, 20),
    equal_mass=st.booleans(), allow_zero=st.booleans(), ties=st.booleans(), weighted=st.booleans(),
)  # fmt: skip
def test_every_answer_can_be_counted(seed, n, c, bins, equal_mass, allow_zero, ties, weighted):
    logits, labels = overconfident(n, c, seed)
    logits = logits.round() if ties else logits
    weights = torch.rand(n, generator=generator(seed), dtype=torch.float64) + 0.1 if weighted else None
    calibrator = HistogramBinning(bins, equal_mass=equal_mass, allow_zero=allow_zero)
    calibrator.fit(logits, labels, weights=weights)
    odds = one_vs_rest.log_odds(logits).numpy()
    hits = one_vs_rest.outcomes(labels, c).numpy()
    w = np.ones(n) if weights is None else weights.numpy()
    q = counted(calibrator, odds, hits, w, 0 if allow_zero else 1 / c)
    if c == 2:
        expected = np.concatenate([1 - q, q], 1)
    else:
        total = q.sum(1, keepdims=True)
        expected = np.where(total > 0, q / np.where(total > 0, total, 1), 1 / c)
    np.testing.assert_allclose(calibrator(logits).exp().numpy(), expected, atol=1e-9)
    for k in range(odds.shape[1]):
        edges = calibrator.edges[k].numpy()
        index = (odds[:, k, None] > edges).sum(1)
        used = np.isfinite(edges).sum() + 1
        assert set(index) == set(range(used)), "no bin is empty"
        assert (np.diff(edges[np.isfinite(edges)]) > 0).all()


@pytest.mark.parametrize("c", [2, 3])
def test_bins_of_equal_mass(c):
    logits, labels = overconfident(1000, c)
    calibrator = HistogramBinning(10).fit(logits, labels)
    odds = one_vs_rest.log_odds(logits)
    for k in range(odds.shape[1]):
        assert torch.searchsorted(calibrator.edges[k], odds[:, k].contiguous()).bincount().tolist() == [100] * 10


def test_bins_of_equal_weight():
    odds = torch.arange(10).double()
    weights = torch.tensor([7.0, 1, 1, 1, 1, 1, 1, 1, 1, 6])
    calibrator = HistogramBinning(3).fit(torch.stack([0 * odds, odds], 1), (odds > 4).long(), weights=weights)
    assert calibrator.edges.tolist() == [[0.5, 7.5]]


def test_bins_of_equal_width_lie_in_probability():
    p = torch.linspace(0.001, 0.999, 500).double()
    calibrator = HistogramBinning(4, equal_mass=False).fit(torch.stack([1 - p, p], 1).log(), (p > 0.5).long())
    assert torch.allclose(calibrator.edges.sigmoid(), torch.tensor([[0.25, 0.5, 0.75]]).double())


def test_one_bin_is_the_share_of_the_class():
    logits, labels = overconfident(100, 2)
    p = HistogramBinning(1, allow_zero=True).fit(logits, labels).predict_proba(logits)
    assert torch.allclose(p[:, 1], labels.double().mean())


def test_close_scores_are_told_apart():
    odds = torch.tensor([1.0] * 4 + [1.00001] * 4)
    calibrator = HistogramBinning(2, allow_zero=True).fit(torch.stack([0 * odds, odds], 1), torch.arange(8) // 4)
    assert calibrator.predict_proba(torch.stack([0 * odds, odds], 1))[:, 1].tolist() == [0.0] * 4 + [1.0] * 4


@pytest.mark.bad_input
@pytest.mark.parametrize("bins", [0, -1, 2.5, True])
def test_bad_arguments(bins):
    with pytest.raises(InputError, match="bins must be"):
        HistogramBinning(bins)
