"""InfoNCE against its definition; golden vectors are with those of the Mann-Whitney loss, 10-mw-loss."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.losses import InfoNCE


@settings(max_examples=40)
@given(st.integers(0, 999), st.integers(1, 5), st.integers(2, 6))
def test_each_positive_among_the_negatives_of_its_row(seed, q, d):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(q, d, generator=generator, dtype=torch.float64)
    kinds = torch.randint(3, (q, d), generator=generator)
    right, dropped = kinds == 0, kinds == 1
    if not right.any() or not (kinds == 2).any():
        return
    expected = []
    for i, j in right.nonzero():
        mass = torch.exp(scores[i, kinds[i] == 2] / 0.5).sum()
        own = torch.exp(scores[i, j] / 0.5)
        expected.append(-torch.log(own / (own + mass)))
    expected = torch.stack(expected)
    for reduction in ("none", "mean", "sum"):
        found = InfoNCE(temperature=0.5, reduction=reduction)(scores, right, dropped=dropped)
        torch.testing.assert_close(found, expected if reduction == "none" else getattr(expected, reduction)())


@pytest.mark.parametrize("positive", [None, torch.eye(2).bool()])
def test_a_row_without_negatives_has_no_loss_and_a_finite_gradient(positive):
    scores = torch.tensor([[1.0, 2.0], [0.5, 0.0]], requires_grad=True)
    losses = InfoNCE(temperature=1, reduction="none")(scores, positive, dropped=torch.tensor([[0, 1], [0, 0]]).bool())
    losses.sum().backward()
    assert losses[0] == 0
    assert losses[1] > 0
    assert scores.grad.isfinite().all()
    assert torch.equal(scores.grad[0], torch.zeros(2))
