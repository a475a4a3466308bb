"""Binning: the semantics of edges, and sums that agree with the plain definition."""

import definitions
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.metrics import binning

values_in_0_1 = st.lists(st.sampled_from([k / 20 for k in range(21)]) | st.floats(0, 1), min_size=1, max_size=40)


def ranked(values, hits, dtype=torch.float64):
    return binning.rank(torch.tensor([values], dtype=dtype), torch.tensor([hits]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(data=st.data())
def test_ranking_sorts_values_and_takes_the_hits_along(dtype, data):
    values = data.draw(values_in_0_1)
    hits = data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    one = ranked(values, hits, dtype)
    x, h = torch.tensor(values, dtype=dtype), torch.tensor(hits)
    pairs = sorted(zip(x.tolist(), h.tolist()))
    assert list(zip(one.values[0].tolist(), one.hits[0].tolist())) == pairs
    weights = torch.arange(2 * len(values)).reshape(2, -1)
    drawn = binning.rank(x[None], h[None], weights)
    assert torch.equal(drawn.values, one.values)
    triples = sorted(zip(x.tolist(), h.tolist(), *weights.tolist()))
    assert sorted(zip(drawn.values[0].tolist(), drawn.hits[0].tolist(), *drawn.weights.tolist())) == triples


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bins", [*binning.BINS, 1, 7])
def test_a_value_on_an_edge_is_in_the_bin_below(dtype, bins):
    edges = torch.tensor([k / bins for k in range(bins + 1)], dtype=dtype)
    above = torch.nextafter(edges, torch.full_like(edges, 2))[:-1]
    values = torch.cat([edges, above])
    nothing = torch.zeros(1, len(values), dtype=torch.bool)
    expected = np.bincount([max(k - 1, 0) for k in range(bins + 1)] + list(range(bins)), minlength=bins)
    assert binning.bin_sums(values[None], nothing, bins).samples[0].tolist() == expected.tolist()
    places = binning.equal_width(binning.rank(values[None], nothing), [bins])
    assert places.diff()[0].tolist() == expected.tolist()


@given(data=st.data())
def test_sorted_and_unsorted_sums_agree_with_the_definition(data):
    values = data.draw(values_in_0_1)
    hits = data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    bins = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=3))
    one = ranked(values, hits)
    gap, width = binning.gap_sums(one), binning.equal_width(one, bins)
    mass = binning.equal_mass(one, None, bins)
    v, h = np.array(values), np.array(hits)
    for i, b in enumerate(bins):
        sums = binning.bin_sums(one.values, one.hits, b)
        expected = definitions.ece(v, h, b)
        assert float(binning.expected_errors(gap, width, bins)[0, i]) == pytest.approx(expected, abs=1e-12)
        assert float(sums.gap.abs().sum() / len(v)) == pytest.approx(expected, abs=1e-12)
        largest = float(binning.maximum_errors(gap, None, width, bins)[0, i])
        assert largest == pytest.approx(definitions.mce(v, h, b), abs=1e-12)
        if v.min() < v.max():
            expected = definitions.expected_error(v, h, exact_quantile_edges(v, b))
            assert float(binning.expected_errors(gap, mass, bins)[0, i]) == pytest.approx(expected, abs=1e-12)


def exact_quantile_edges(values, bins):
    """The benchmark's edges with the positions k n / bins as exact fractions."""
    n, ordered = len(values), np.sort(values)
    edges = []
    for k in range(bins + 1):
        j, rest = divmod(k * n, bins)
        left, right = ordered[min(j, n - 1)], ordered[min(j + 1, n - 1)]
        edges.append(left if rest == 0 or left == right else np.nextafter(right, -1))
    return np.array(edges)


def test_the_smallest_value_is_in_no_equal_mass_bin_unless_wanted():
    one = ranked([0.1, 0.1, 0.5, 0.9], [False, False, True, True])
    gap = binning.gap_sums(one)
    without = binning.expected_errors(gap, binning.equal_mass(one, None, [1]), [1])
    with_it = binning.expected_errors(gap, binning.equal_mass(one, None, [1], include_lowest=True), [1])
    assert float(without) == pytest.approx(0.6 / 4)
    assert float(with_it) == pytest.approx(0.4 / 4)


@pytest.mark.parametrize("bins", [1, 2, 15, 500])
def test_equal_values_are_one_bin(bins):
    one = ranked([0.75] * 4, [True, True, False, False])
    error = binning.expected_errors(binning.gap_sums(one), binning.equal_mass(one, None, [bins]), [bins])
    assert float(error) == pytest.approx(0.25)


@given(data=st.data())
def test_weights_are_repetitions(data):
    values = data.draw(values_in_0_1)
    n = len(values)
    hits = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    drawn = data.draw(st.lists(st.integers(0, n - 1), min_size=n, max_size=n))
    weights = torch.bincount(torch.tensor(drawn), minlength=n)[None].to(torch.uint8)
    weighted = binning.rank(torch.tensor([values], dtype=torch.float64), torch.tensor([hits]), weights)
    repeated = ranked([values[i] for i in drawn], [hits[i] for i in drawn])
    bins = [1, 3, 15, 50]

    def errors(one):
        gap, mass = binning.gap_sums(one), binning.mass_sums(one)
        width = binning.equal_width(one, bins)
        quantiles = binning.equal_mass(one, mass, bins)
        last = binning.last_of_ties(one.values[0])
        return torch.cat(
            [
                binning.expected_errors(gap, width, bins)[0],
                binning.expected_errors(gap, quantiles, bins)[0],
                binning.maximum_errors(gap, mass, width, bins)[0],
                binning.largest_partial_sum(gap, last),
            ]
        )

    torch.testing.assert_close(errors(weighted), errors(repeated), atol=1e-12, rtol=0)


def test_bin_sums_over_several_chunks(monkeypatch):
    p, y = definitions.some_probs(100, 3)
    hits = y == torch.arange(3)[:, None]
    whole = binning.bin_sums(p.T, hits, 10)
    monkeypatch.setattr(binning, "_CHUNK_ELEMENTS", 21)
    for a, b in zip(whole, binning.bin_sums(p.T, hits, 10)):
        torch.testing.assert_close(a, b)
