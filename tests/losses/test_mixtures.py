import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import one_hot

from trimtab.core.checks import InputError
from trimtab.losses import make_mixtures


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(2, 5), st.integers(1, 3))
def test_every_set_has_one_share_and_one_order(seed, n, c, sets):
    labels = torch.randint(c, (n,), generator=generator(seed))
    hot = one_hot(labels, c).double()
    ids = torch.eye(n, dtype=torch.float64)
    inputs, targets, shares = make_mixtures(ids, labels, classes=c, sets=sets, generator=generator(seed))
    assert inputs.shape == (sets * n, n)
    assert targets.shape == (sets * n, c)
    assert shares.shape == (sets,)
    for mixed, soft, share in zip(inputs.view(sets, n, n), targets.view(sets, n, c), shares.tolist()):
        assert 0 <= share <= 1
        order = (mixed - share * ids).argmax(1) if share < 1 else torch.arange(n)
        assert torch.equal(order.sort().values, torch.arange(n))
        assert torch.allclose(mixed, share * ids + (1 - share) * ids[order])
        assert torch.allclose(soft, share * hot + (1 - share) * hot[order])
        same = labels == labels[order]
        assert torch.equal(soft.amax(1) == 1, same | torch.tensor(share in (0, 1)))
        assert torch.equal(mixed[order == torch.arange(n)], ids[order == torch.arange(n)])


def test_shares_are_beta_distributed():
    for alpha in (0.5, 2.0):
        shares = make_mixtures(
            torch.zeros(2, 1), torch.tensor([0, 1]), classes=2, alpha=alpha, sets=4000, generator=generator()
        ).shares
        assert abs(shares.mean() - 0.5) < 0.02
        assert shares.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)


def test_a_seed_gives_the_same_mixtures_and_the_generator_moves_on():
    x, labels, g = torch.randn(5, 2, 3, generator=generator()), torch.arange(5), generator(3)
    first, second = (make_mixtures(x, labels, classes=5, generator=g) for _ in range(2))
    again = make_mixtures(x, labels, classes=5, generator=generator(3))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first.shares, second.shares)


def test_features_may_be_mixed_and_half_precision_keeps_its_type():
    x = torch.randn(4, 3, generator=generator()).requires_grad_()
    make_mixtures(x, torch.arange(4), classes=4, sets=2, generator=generator()).inputs.sum().backward()
    np.testing.assert_allclose(x.grad, 2.0, rtol=1e-6)
    mixed = make_mixtures(x.detach().bfloat16(), torch.arange(4), classes=4, generator=generator())
    assert (mixed.inputs.dtype, mixed.targets.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, dtype=torch.uint8)}, "x must be floating point with at least one row"),
        ({"x": torch.zeros(0, 3)}, "x must be floating point with at least one row"),
        ({"x": torch.tensor([[0.0], [torch.nan]])}, "x must be finite, found nan at row 1"),
        ({"x": torch.zeros(2, 3, device="meta")}, "labels must be on the device of x"),
        ({"labels": torch.tensor([0, 2])}, r"labels must lie in 0..1, found 2 at row 1"),
        ({"labels": torch.tensor([0])}, "labels must have 2 entries"),
        ({"labels": torch.tensor([0.0, 1.0])}, "labels must be integer class indices"),
        ({"classes": 1}, "classes must be at least 2"),
        ({"alpha": 0.0}, r"alpha must lie in \(0, inf\)"),
        ({"sets": 0}, "sets must be at least 1"),
    ],
)
def test_bad_input_is_refused(change, message):
    good = {"x": torch.zeros(2, 3), "labels": torch.tensor([0, 1]), "classes": 2, "generator": generator()}
    with pytest.raises(InputError, match=message):
        make_mixtures(**{**good, **change})
