"""Margins of CosFace, ArcFace and MagFace; their golden vectors are with those of 57-unpg."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.core.checks import InputError
from trimtab.losses import ArcFace, CosFace, MagFace


def batch(seed, n=6, width=4, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, width, generator=generator, dtype=torch.float64), torch.arange(n) % 3


def cosines(head, x):
    return F.cosine_similarity(x[:, None], head.weight[None], dim=2)


@settings(max_examples=30)
@given(st.integers(0, 999), st.floats(0, 1))
def test_the_own_class_s_cosine_and_no_other(seed, margin):
    x, y = batch(seed)
    own = F.one_hot(y, 3).bool()
    for head, margined in (
        (CosFace(4, 3, scale=10, margin=margin).double(), lambda cosine: cosine - margin),
        (ArcFace(4, 3, scale=10, margin=margin).double(), lambda cosine: (cosine.acos() + margin).cos()),
    ):
        plain = cosines(head, x)
        expected = 10 * torch.where(own, margined(plain), plain)
        torch.testing.assert_close(head.logits(x, y), expected)
        torch.testing.assert_close(head(x, y), F.cross_entropy(expected, y))


def test_the_margin_of_magface_grows_with_the_length():
    head = MagFace(4, 3, scale=1, lengths=(1, 5), margins=(0.2, 0.6), penalty_weight=2).double()
    direction = F.normalize(head.weight.detach()[:1] + 0.1)
    y = torch.zeros(1, dtype=torch.long)
    for length, margin in ((0.5, 0.2), (1, 0.2), (3, 0.4), (5, 0.6), (9, 0.6)):
        x = length * direction
        cosine = cosines(head, x)[0, 0]
        torch.testing.assert_close(head.logits(x, y)[0, 0], (cosine.acos() + margin).cos())
        held = min(max(length, 1), 5)
        torch.testing.assert_close(head.penalty(x), torch.tensor(2 * (held / 25 + 1 / held)).double())
    against = -3 * direction
    torch.testing.assert_close(head.logits(against, y)[0, 0], cosines(head, against)[0, 0])
    torch.testing.assert_close(torch.linalg.vector_norm(head.weight.detach(), dim=1), torch.ones(3).double())


@pytest.mark.parametrize("kind", [CosFace, ArcFace, MagFace])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_embeddings_along_a_weight_or_of_length_zero_have_finite_gradients(kind, dtype):
    head = kind(4, 3).to(dtype)
    along = head.weight.detach()[0]
    x = torch.stack([20 * along, -20 * along, 0 * along]).requires_grad_(True)
    head(x, torch.tensor([0, 0, 1])).backward()
    assert x.grad.isfinite().all()
    assert head.weight.grad.isfinite().all()


def test_weights_come_from_the_generator():
    for kind in (CosFace, ArcFace, MagFace):
        assert torch.equal(kind(4, 3).weight, kind(4, 3).weight)
        other = kind(4, 3, generator=torch.Generator().manual_seed(1))
        assert not torch.equal(kind(4, 3).weight, other.weight)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CosFace(0, 3), "features must be at least 1, got 0"),
        (lambda: CosFace(4, 1), "classes must be at least 2, got 1"),
        (lambda: CosFace(4, 3, scale=0.0), r"scale must lie in \(0, inf\)"),
        (lambda: CosFace(4, 3, margin=-0.1), "margin must lie in"),
        (lambda: ArcFace(4, 3, margin=math.pi + 0.1), "margin must lie in"),
        (lambda: MagFace(4, 3, lengths=(0, 10)), "lengths must lie in"),
        (lambda: MagFace(4, 3, lengths=(10, 10)), "lengths must differ, both are 10"),
        (lambda: MagFace(4, 3, margins=(0.8, 0.4)), "margins must be ascending, got 0.8, 0.4"),
        (lambda: MagFace(4, 3, penalty_weight=-1), "penalty_weight must lie in"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
