"""Prototypes and the scores of queries."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.core.checks import InputError
from trimtab.losses import prototype_logits, prototypes


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.integers(1, 20))
def test_means_of_classes_and_their_squared_distances(seed, n):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    y = 10 * torch.randint(4, (n,), generator=generator)
    means, classes = prototypes(x, y)
    assert classes.tolist() == sorted(set(y.tolist()))
    torch.testing.assert_close(means, torch.stack([x[y == c].mean(0) for c in classes]))
    torch.testing.assert_close(prototype_logits(x, means, 2.0), -torch.cdist(x, means).square() / 2)


def test_gradients_reach_queries_and_support():
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 1, 0, 1, 1, 0])
    assert torch.autograd.gradcheck(lambda x: prototype_logits(x, prototypes(x, y)[0]), (x,))


@pytest.mark.bad_input
def test_bad_input_is_refused():
    x = torch.ones(2, 3)
    with pytest.raises(InputError, match="queries must have 2 columns, got 3"):
        prototype_logits(x, x[:, :2])
    with pytest.raises(InputError, match=r"temperature must lie in \(0, inf\)"):
        prototype_logits(x, x, 0.0)
    with pytest.raises(InputError, match="labels must have 2 entries"):
        prototypes(x, torch.tensor([1]))
    with pytest.raises(InputError, match="means must be on the device of queries"):
        prototype_logits(x, x.to("meta"))
