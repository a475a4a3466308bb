"""pass@N, by probabilities and by samples (07-dco)."""

from math import comb

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.core.checks import InputError
from trimtab.losses import pass_at_n, pass_at_n_unbiased


def test_small_probabilities_are_not_rounded_away():
    torch.testing.assert_close(pass_at_n(torch.tensor([0.0, 1e-10, 1.0]), 1000), torch.tensor([0.0, 1e-7, 1.0]))


@given(st.integers(1, 300), st.data())
def test_samples_are_counted_as_combinations(drawn, data):
    samples = data.draw(st.integers(1, drawn))
    right = torch.arange(drawn + 1)
    expected = [1 - comb(drawn - c, samples) / comb(drawn, samples) for c in range(drawn + 1)]
    for n in (drawn, torch.full_like(right, drawn)):
        found = pass_at_n_unbiased(n, right, samples)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-11)


def test_the_estimate_is_unbiased():
    p, n, samples = torch.tensor([0.02, 0.2], dtype=torch.float64), 30, 8
    right = torch.rand(20_000, 2, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64) < p[:, None]
    means = torch.stack([pass_at_n_unbiased(n, c, samples).mean() for c in right.sum(2).T])
    torch.testing.assert_close(means, pass_at_n(p, samples), rtol=0, atol=0.006)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: pass_at_n(torch.tensor([0.5, 2.0]), 4), r"p must lie in \[0, 1\], found 2 at row 1"),
        (lambda: pass_at_n(torch.tensor([1, 0]), 4), "p must be a floating-point vector"),
        (lambda: pass_at_n(torch.tensor([0.5]), 0), "samples must be at least 1"),
        (lambda: pass_at_n_unbiased(3, torch.tensor([1]), 4), "drawn must be at least 4, found 1 of 3 at row 0"),
        (lambda: pass_at_n_unbiased(8, torch.tensor([1, 9]), 4), "right must not exceed drawn, found 9 of 8 at row 1"),
        (lambda: pass_at_n_unbiased(8, torch.tensor([-1]), 4), "right must be >= 0, found -1 at row 0"),
        (lambda: pass_at_n_unbiased(8, torch.tensor([1.0]), 4), "right must be a vector of integers"),
        (lambda: pass_at_n_unbiased(torch.tensor([8, 8]), torch.tensor([1]), 4), r"drawn must be .* of shape \(2,\)"),
        (lambda: pass_at_n_unbiased(torch.tensor([8.5]), torch.tensor([1]), 4), "drawn must be .* got torch.float32"),
    ],
)
def test_impossible_counts_are_refused_in_words(call, told):
    with pytest.raises(InputError, match=told):
        call()
