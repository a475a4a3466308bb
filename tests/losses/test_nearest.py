"""Neighbours found in blocks are those of all pairs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.losses import nearest as module
from trimtab.losses.nearest import distances, nearest


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.integers(1, 20), st.integers(2, 20), st.integers(1, 60), st.booleans())
def test_blocks_find_what_sorting_finds(seed, n, m, at_once, own):
    generator = torch.Generator().manual_seed(seed)
    # far from the origin and near each other: products of uncentred single-precision points would lose their order
    origins, targets = (1e4 + torch.randn(k, 3, generator=generator) for k in (n, m))
    left = torch.randint(m, (n,), generator=generator) if own else None
    count = int(torch.randint(1, m + 1 - own, (), generator=generator))
    exact = distances(origins[:, None].double(), targets.double())
    if left is not None:
        exact.scatter_(1, left[:, None], torch.inf)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PAIRS_AT_ONCE", at_once)
        found = nearest(origins, targets, count, left)
    torch.testing.assert_close(exact.gather(1, found), exact.sort(1).values[:, :count])


def test_points_that_meet_have_a_gradient():
    x = torch.zeros(2, 3, requires_grad=True)
    value = distances(x, torch.zeros(2, 3))
    value.sum().backward()
    torch.testing.assert_close(value, torch.full((2,), 1e-3))
    assert (x.grad == 0).all()
