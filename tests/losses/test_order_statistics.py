"""The radix selection, against sorting."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.losses.order_statistics import ranked


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(values=st.lists(st.floats(allow_nan=False, width=32), min_size=1, max_size=40), size=st.integers(1, 50))
def test_it_is_sorting(dtype, values, size):
    x = torch.tensor(values, dtype=dtype)
    found = ranked(lambda: x.split(size), torch.arange(len(x)), dtype)
    assert torch.equal(found, x.sort().values)


def test_a_place_may_be_asked_for_twice_and_parts_may_have_any_shape():
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = ranked(lambda: [x[:2], x[2:].T], torch.tensor([29, 0, 0]), torch.float64)
    assert found.tolist() == [x.max(), x.min(), x.min()]
