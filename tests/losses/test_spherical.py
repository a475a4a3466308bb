"""The elders of the Z-loss: closed forms, and what their names promise."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.core.checks import InputError
from trimtab.losses import SphericalSoftmaxLoss, SquaredErrorLoss, TaylorSoftmaxLoss

LOSSES = (SquaredErrorLoss, TaylorSoftmaxLoss, SphericalSoftmaxLoss)
some = st.integers(0, 10_000)


def scores(seed, n=5, c=7):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, c, generator=generator, dtype=torch.float64)
    return logits, torch.randint(c, (n,), generator=generator)


@settings(max_examples=12)
@given(some)
def test_the_squared_error_is_that_to_the_one_hot_target(seed):
    logits, labels = scores(seed)
    expected = F.mse_loss(logits, F.one_hot(labels, 7).double(), reduction="sum") / 5
    torch.testing.assert_close(SquaredErrorLoss()(logits, labels), expected)


@settings(max_examples=12)
@given(some, st.sampled_from([TaylorSoftmaxLoss, SphericalSoftmaxLoss]))
def test_a_softmax_gives_probabilities(seed, kind):
    logits, _ = scores(seed, n=1)
    losses = torch.stack([kind()(logits, torch.tensor([label])) for label in range(7)])
    torch.testing.assert_close((-losses).exp().sum(), torch.ones((), dtype=torch.float64))
    form = 1 + logits + logits.square() / 2 if kind is TaylorSoftmaxLoss else logits.square() + 1e-6
    torch.testing.assert_close((-losses).exp(), (form / form.sum())[0])


@settings(max_examples=12)
@given(some, st.sampled_from(LOSSES), st.sampled_from(["mean", "sum", "none"]))
def test_the_sums_are_all_that_it_sees(seed, kind, reduction):
    logits, labels = scores(seed)
    leaf = logits.clone().requires_grad_()
    target = leaf.gather(1, labels[:, None])[:, 0]
    loss = kind(reduction=reduction)
    by_sums = loss.of_sums(target, leaf.square().sum(1), leaf.sum(1), 7)
    (expected,) = torch.autograd.grad(by_sums.sum(), leaf)
    value = loss(leaf, labels)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    torch.testing.assert_close(value, by_sums)
    torch.testing.assert_close(gradient, expected)
    assert value.shape == ((5,) if reduction == "none" else ())


@pytest.mark.bad_input
@pytest.mark.parametrize("kind", LOSSES)
def test_scores_whose_squares_overflow_are_refused(kind):
    with pytest.raises(InputError, match="the sum of squared logits must be finite, found inf at row 0"):
        kind()(torch.tensor([[1e30, -1e30], [0.0, 1.0]]), torch.tensor([0, 1]))


@pytest.mark.bad_input
def test_settings_out_of_range_are_refused():
    with pytest.raises(InputError, match=r"eps must lie in \(0, inf\)"):
        SphericalSoftmaxLoss(eps=0.0)
    with pytest.raises(InputError, match="reduction must be one of"):
        TaylorSoftmaxLoss(reduction="median")
