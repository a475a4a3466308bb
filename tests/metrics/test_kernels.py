"""The kernel measures against sums over all pairs and exact densities."""

import definitions
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.metrics import kernels
from trimtab.metrics.binning import rank

unit = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]) | st.floats(0, 1), min_size=1, max_size=30)


def ranked(values, hits, weights=None):
    values, hits = torch.as_tensor(values, dtype=torch.float64), torch.as_tensor(hits)
    return rank(values[None], hits[None], weights)


@given(data=st.data(), width=st.floats(0.01, 10), size=st.integers(1, 7))
def test_the_recurrence_is_the_sum_over_all_pairs(data, width, size):
    values = data.draw(unit)
    hits = data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_BLOCK_ELEMENTS", size)
        error = float(kernels.laplace_error(ranked(values, hits), width))
    expected = definitions.mmce(np.array(values), np.array(hits), width)
    assert error**2 == pytest.approx(expected**2, abs=1e-13)


@pytest.mark.parametrize("n", [1000, 3000])
def test_the_recurrence_keeps_its_precision(n):
    p, y = definitions.some_probs(n, 4)
    values, hits = definitions.top(p, y)
    for width in (0.01, 0.4):
        error = float(kernels.laplace_error(ranked(values, hits), width))
        assert error == pytest.approx(definitions.mmce(values, hits, width), rel=1e-10)


@pytest.mark.parametrize(("n", "c", "scale"), [(60, 3, 1.0), (300, 10, 3.0), (1000, 4, 8.0)])
def test_the_grid_is_as_good_as_exact_densities(n, c, scale):
    values, hits = definitions.top(*definitions.some_probs(n, c, scale))
    assert float(kernels.density_error(ranked(values, hits))) == pytest.approx(
        definitions.kdece(values, hits), abs=1e-4
    )


@settings(max_examples=30)
@given(confidence=st.floats(0.05, 1), right=st.integers(1, 6), wrong=st.integers(0, 6))
def test_equal_confidences_give_their_distance_from_accuracy(confidence, right, wrong):
    n = right + wrong
    error = float(kernels.density_error(ranked([confidence] * n, [True] * right + [False] * wrong)))
    assert error == pytest.approx(abs(confidence - right / n), abs=2e-4)


@settings(max_examples=30)
@given(data=st.data())
def test_density_errors_are_in_bounds_and_undefined_without_a_hit(data):
    values = data.draw(unit)
    hits = data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    error = float(kernels.density_error(ranked(values, hits)))
    assert 0 <= error <= 1 + 1e-9 if any(hits) else np.isnan(error)


@settings(max_examples=30)
@given(data=st.data())
def test_weights_are_repetitions(data):
    values = data.draw(unit)
    n = len(values)
    hits = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    drawn = data.draw(st.lists(st.lists(st.integers(0, n - 1), min_size=n, max_size=n), min_size=1, max_size=3))
    weights = torch.stack([torch.bincount(torch.tensor(d), minlength=n) for d in drawn]).to(torch.uint8)
    weighted = ranked(values, hits, weights)
    for k, indices in enumerate(drawn):
        repeated = ranked([values[i] for i in indices], [hits[i] for i in indices])
        for measure in (kernels.density_error, lambda one: kernels.laplace_error(one, 0.4) ** 2):
            torch.testing.assert_close(measure(weighted)[k], measure(repeated)[0], equal_nan=True, atol=1e-9, rtol=0)
