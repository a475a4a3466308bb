"""Batches of the examples that still have something to learn (07-dco)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from trimtab.core.checks import InputError
from trimtab.losses import UncertainBatches, select_uncertain


def test_the_threshold_itself_is_not_uncertain():
    assert select_uncertain(torch.tensor([0.5, 0.25, 0.75]), 0.5).tolist() == [2]


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 100))
def test_nothing_uncertain_is_lost(n, batch_size, seed):
    factors = torch.rand(n, generator=torch.Generator().manual_seed(seed))
    batches = UncertainBatches(range(n), lambda rows: factors[rows], batch_size=batch_size, threshold=0.5)
    uncertain = (factors > 0.5).nonzero()[:, 0].tolist()
    expected = 3 * uncertain
    seen = [row for _ in range(3) for batch in batches for row in batch if len(batch) == batch_size]
    assert sorted(expected[: len(seen)]) == sorted(seen)
    assert len(expected) - len(seen) < batch_size


def test_batches_are_scored_by_the_model_of_the_moment():
    factors = torch.ones(4)
    batches = iter(UncertainBatches(range(4), lambda rows: factors[rows], batch_size=2))
    assert next(batches) == [0, 1]
    factors.zero_()
    assert next(batches, None) is None


def test_it_feeds_a_loader():
    batches = UncertainBatches(range(6), lambda rows: torch.tensor(rows) % 2 * 1.0, batch_size=3)
    loader = DataLoader(TensorDataset(torch.arange(6)), batch_sampler=batches, generator=torch.Generator())
    assert [x.tolist() for (x,) in loader] == [[1, 3, 5]]


@pytest.mark.bad_input
def test_what_cannot_be_selected_is_refused_in_words():
    with pytest.raises(InputError, match=r"factor must lie in \[0, 1\], found 2 at row 0"):
        select_uncertain(torch.tensor([2.0]))
    with pytest.raises(InputError, match="factor must be a floating-point vector"):
        select_uncertain(torch.zeros(2, 2))
    with pytest.raises(InputError, match=r"threshold must lie in \[0, 1\]"):
        UncertainBatches(range(3), torch.zeros, batch_size=2, threshold=2)
    with pytest.raises(InputError, match="score must give 2 factors for 2 indices"):
        list(UncertainBatches(range(3), lambda rows: torch.zeros(3), batch_size=2))
