"""Mixup and DMixup: slug 04-ts-limitations."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, linear

from trimtab.core.checks import InputError
from trimtab.losses import DMixup, Mixup

GOLDEN = Path(__file__).parents[1] / "golden" / "04-ts-limitations"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.golden
@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.npz")), ids=lambda path: path.stem)
def test_the_authors_numbers(path):
    with np.load(path) as file:
        arrays = {name: torch.from_numpy(np.asarray(file[name])) for name in file.files}
    loss = DMixup(points=int(arrays["mix_size"]), alpha=float(arrays["alpha"]))
    cases = sorted(name.removeprefix("loss") for name in arrays if name.startswith("loss"))
    for case in cases:
        x, w, b = (arrays[name].clone().requires_grad_() for name in (f"x{case}", "W", "b"))
        mixed = loss.mix(x, weights=arrays[f"weights{case}"], orders=arrays[f"perms{case}"])
        value = loss(linear(mixed.inputs, w, b), arrays[f"y{case}"], mixed)
        value.backward()
        tolerance = 1e-10 if x.dtype == torch.float64 else 1e-6
        for name, found in {"loss": value, "grad_x": x.grad, "grad_W": w.grad, "grad_b": b.grad}.items():
            expected = arrays[f"{name}{case}"]
            np.testing.assert_allclose(
                found.detach(), expected, rtol=tolerance, atol=tolerance, err_msg=f"{name}{case}"
            )
    assert cases


@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 9),
    points=st.integers(1, 5),
    per_sample=st.booleans(),
    shape=st.sampled_from([(), (3,), (2, 2)]),
)
def test_mixtures_and_their_loss(seed, n, points, per_sample, shape):
    x = torch.randn(n, *shape, generator=generator(seed), dtype=torch.float64)
    labels = torch.randint(4, (n,), generator=generator(seed))
    logits = torch.randn(n, 4, generator=generator(seed), dtype=torch.float64)
    loss = DMixup(points=points, per_sample=per_sample, generator=generator(seed))
    mixed = loss.mix(x)
    assert mixed.orders.shape == (points - 1, n)
    assert mixed.weights.shape == ((points, n) if per_sample else (points,))
    torch.testing.assert_close(mixed.weights.sum(0), torch.ones(mixed.weights.shape[1:]))
    inputs, expected = torch.zeros_like(x), 0.0
    rows = [torch.arange(n), *mixed.orders]
    for order, weight in zip(rows, mixed.weights.double().view(points, -1).expand(points, n)):
        assert torch.equal(order.sort().values, torch.arange(n))
        inputs += weight.view(n, *[1] * len(shape)) * x[order]
        expected += (weight * cross_entropy(logits, labels[order], reduction="none")).mean()
    torch.testing.assert_close(mixed.inputs, inputs)
    torch.testing.assert_close(loss(logits, labels, mixed), expected)


def test_one_point_is_ordinary_training():
    x, labels = torch.randn(5, 3, generator=generator()), torch.arange(5) % 3
    loss = DMixup(points=1)
    mixed = loss.mix(x)
    assert torch.equal(mixed.inputs, x)
    torch.testing.assert_close(loss(x, labels, mixed), cross_entropy(x, labels))


def test_a_batch_of_one_is_mixed_with_itself():
    x, labels = torch.randn(1, 3, generator=generator()), torch.tensor([2])
    for loss in (Mixup(), DMixup(points=5, per_sample=True)):
        mixed = loss.mix(x)
        torch.testing.assert_close(mixed.inputs, x)
        torch.testing.assert_close(loss(x, labels, mixed), cross_entropy(x, labels))


@pytest.mark.parametrize("alpha", [0.3, 1.0, 4.0])
def test_weights_follow_dirichlet(alpha):
    k, n = 3, 4000
    weights = DMixup(points=k, alpha=alpha, per_sample=True).mix(torch.zeros(n, 1)).weights
    variance = (k - 1) / (k**2 * (k * alpha + 1))
    torch.testing.assert_close(weights.mean(1), torch.full((k,), 1 / k), atol=0.03, rtol=0)
    torch.testing.assert_close(weights.var(1), torch.full((k,), variance), atol=0, rtol=0.1)


def test_its_state_continues():
    x = torch.randn(6, 2, generator=generator())
    loss, other = Mixup(generator=generator(5)), Mixup()
    loss.mix(x)
    other.load_state_dict(loss.state_dict())
    for one, two in zip(loss.mix(x), other.mix(x)):
        assert torch.equal(one, two)


def test_half_precision_inputs_stay_so():
    assert Mixup().mix(torch.ones(4, 2, dtype=torch.bfloat16)).inputs.dtype == torch.bfloat16


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(0, 2)}, r"x must be floating point with at least one row, got float32"),
        ({"x": torch.zeros(3, 2, dtype=torch.long)}, r"floating point with at least one row, got int64 \(3, 2\)"),
        ({"x": torch.full((3, 2), torch.nan)}, "x must be finite"),
        ({"weights": torch.tensor([0.5, 0.3])}, "weights must be >= 0 and sum to one over the 2 points"),
        ({"weights": torch.tensor([1.5, -0.5])}, "weights must be >= 0"),
        ({"weights": torch.ones(3) / 3}, r"weights must be floating point of shape \(2,\) or \(2, 3\)"),
        ({"orders": torch.tensor([[0, 1, 3]])}, "orders must lie in 0..2, found 3 at row 2"),
        ({"orders": torch.tensor([0, 1, 2])}, r"orders must have shape \(1, 3\), got \(3,\)"),
    ],
)
def test_bad_mixtures_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        Mixup().mix(**{"x": torch.zeros(3, 2)} | arguments)


@pytest.mark.bad_input
def test_other_bad_input_is_refused():
    loss = Mixup()
    mixed = loss.mix(torch.zeros(3, 2))
    with pytest.raises(InputError, match="mixed must be of 4 samples as logits, got 3"):
        loss(torch.zeros(4, 2), torch.zeros(4, dtype=torch.long), mixed)
    with pytest.raises(InputError, match="labels must be integer class indices, got float32"):
        loss(torch.zeros(3, 2), torch.zeros(3), mixed)
    logits, labels = torch.zeros(3, 2), torch.zeros(3, dtype=torch.long)
    for swapped in ((logits, mixed, labels), (mixed, logits, labels), (logits, labels, tuple(mixed))):
        with pytest.raises(InputError, match="mixed must be what mix returned, after logits and labels, got"):
            loss(*swapped)
    for settings, message in [
        ({"points": 0}, "points must be at least 1"),
        ({"alpha": 0}, "alpha must lie in"),
    ]:
        with pytest.raises(InputError, match=message):
            DMixup(**settings)
