"""The output layer of constant cost against the dense layer: slug 34-z-loss."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trimtab.core.checks import InputError
from trimtab.losses import SphericalSoftmaxLoss, SquaredErrorLoss, TaylorSoftmaxLoss, ZLoss
from trimtab.nn import FactoredOutput

GOLDEN = Path(__file__).parents[1] / "golden" / "34-z-loss"
LOSSES = {
    "z": ZLoss(a=0.5, b=2.0),
    "z, sum": ZLoss(reduction="sum"),
    "squared error": SquaredErrorLoss(),
    "taylor": TaylorSoftmaxLoss(),
    "spherical": SphericalSoftmaxLoss(eps=0.1),
}


def layer(features=5, classes=30, std=0.5, seed=0, **settings):
    generator = torch.Generator().manual_seed(seed)
    return FactoredOutput(features, classes, std=std, generator=generator, dtype=torch.float64, **settings)


def batch(seed, n, features=5, classes=30):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(n, features, generator=generator, dtype=torch.float64)
    return h, torch.randint(min(classes, 4), (n,), generator=generator)


def dense_step(weight, h, labels, loss, lr):
    weight, h = weight.clone().requires_grad_(), h.clone().requires_grad_()
    value = loss(h @ weight.T, labels)
    on_weight, on_h = torch.autograd.grad(value, (weight, h))
    return value.detach(), on_h, (weight - lr * on_weight).detach()


def close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * max(1.0, float(expected.abs().max())))


@pytest.mark.golden
@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.npz")), ids=lambda path: path.stem)
def test_the_authors_numbers(path):
    with np.load(path) as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    cases = sorted({name.split("/")[0] for name in arrays if name.endswith("/W_after_sgd")})
    for case in cases:
        get = {name.split("/")[1]: value for name, value in arrays.items() if name.startswith(f"{case}/")}
        tolerance = 1e-9 if get["o"].dtype == torch.float64 else 1e-4
        classes, features = get["W"].shape
        factored = FactoredOutput(features, classes, dtype=torch.float64)
        factored.load_weight(get["W"].double())
        h = get["H"].double().requires_grad_()
        close(factored(h).detach(), get["o"].double(), tolerance)
        value = factored.step(h, get["target"], ZLoss(reduction="sum").of_sums, lr=float(get["eta"]))
        value.backward()
        close(value.detach(), get["loss_sum"].double(), tolerance)
        close(h.grad, get["grad_H"].double(), tolerance)
        close(factored.weight(), get["W_after_sgd"].double(), tolerance)
    assert cases


@settings(max_examples=15)
@given(
    st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 6), st.integers(3, 40), st.sampled_from(sorted(LOSSES))
)
def test_every_step_is_that_of_the_dense_layer(seed, n, features, classes, name):
    factored = layer(features, classes, seed=seed, condition_every=3)
    weight, loss = factored.weight(), LOSSES[name]
    for step in range(4):
        h, labels = batch(seed + step, n, features, classes)
        expected = dense_step(weight, h, labels, loss, lr=0.02)
        h.requires_grad_()
        value = factored.step(h, labels, loss.of_sums, lr=0.02)
        value.backward()
        for actual, wanted in zip((value.detach(), h.grad, factored.weight()), expected):
            close(actual, wanted, 1e-7)
        weight = expected[2]
    close(factored.gram, weight.T @ weight, 1e-7)
    close(factored.total, weight.sum(0), 1e-7)
    close(factored.u @ factored.u_inverse, torch.eye(features, dtype=torch.float64), 1e-7)
    close(factored(h).detach(), h.detach() @ weight.T, 1e-7)


def test_a_loss_of_ones_own():
    def largest_scores_cost(target, squares, total, classes):
        return (squares / classes - target * total).tanh().sum()

    def dense(logits, labels):
        target = logits.gather(1, labels[:, None])[:, 0]
        return largest_scores_cost(target, logits.square().sum(1), logits.sum(1), logits.shape[1])

    factored, (h, labels) = layer(), batch(0, 4)
    expected = dense_step(factored.weight(), h, labels, dense, lr=0.1)
    close(factored.step(h, labels, largest_scores_cost, lr=0.1), expected[0])
    close(factored.weight(), expected[2])


def test_it_trains_a_body():
    body, head = torch.nn.Parameter(torch.eye(5, dtype=torch.float64)), layer()
    x, labels = batch(0, 8)
    loss = head.step(x @ body, labels, ZLoss().of_sums, lr=0.0)
    loss.backward()
    (expected,) = torch.autograd.grad(ZLoss()(x @ body @ head.weight().T, labels), body)
    close(body.grad, expected)
    assert not list(head.parameters())


class Traffic(TorchDispatchMode):
    """Elements read and written by all operations; of a table whose rows are picked, only those rows."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            picks = func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_add_.default)
            touched = [*args[1:], kwargs, *([] if func is torch.ops.aten.index_add_.default else [out])]
            touched = touched if picks else [args, kwargs, out]
            self.elements += sum(x.numel() for x in tree_leaves(touched) if isinstance(x, torch.Tensor))
        return out


def test_a_step_touches_as_much_for_a_million_classes_as_for_a_thousand():
    def traffic(classes, n=6, features=5):
        factored = FactoredOutput(features, classes, std=0.1, condition_every=2)
        h, labels = batch(0, n, features)
        h = h.float().requires_grad_()
        with Traffic() as counted:
            for _ in range(4):
                factored.step(h, labels, ZLoss().of_sums, lr=0.1).backward()
        return counted.elements

    assert traffic(1_000) == traffic(1_000_000)
    with Traffic() as counted:
        FactoredOutput(5, 1_000)(torch.ones(6, 5))
    assert counted.elements > 1_000


def test_conditioning_keeps_the_weights():
    factored = layer(condition_every=10_000)
    for step in range(100):
        factored.step(*batch(step, 6), LOSSES["squared error"].of_sums, lr=0.02)
        if torch.linalg.svdvals(factored.u).min() < 0.5:
            break
    weight = factored.weight()
    assert torch.linalg.svdvals(factored.u).min() < 0.5
    factored.condition()
    after = torch.linalg.svdvals(factored.u)
    assert after.min() >= 0.5 - 1e-12
    assert after.max() <= 2 + 1e-12
    close(factored.weight(), weight)
    close(factored.u @ factored.u_inverse, torch.eye(5, dtype=torch.float64))


def test_a_step_that_forgets_a_direction_is_exact():
    factored, one, label = layer(), torch.ones(1, 5, dtype=torch.float64), torch.tensor([3])
    expected = dense_step(factored.weight(), one, label, SquaredErrorLoss(), lr=0.1)  # lr = 1 / (2 |h|^2)
    close(factored.step(one, label, SquaredErrorLoss().of_sums, lr=0.1), expected[0])
    close(factored.weight(), expected[2])
    close(factored.gram, expected[2].T @ expected[2])
    close(factored.total, expected[2].sum(0))
    assert (expected[2] @ one.T).square().sum() < 2


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("lr", [0.1, 1.0, 3.0])
def test_rates_that_shrink_directions_at_every_step_are_exact(dtype, tolerance, lr):
    factored = layer(16, 10, std=0.1).to(dtype)
    weight = factored.weight()
    for step in range(60):
        h, labels = batch(step, 50, 16, 10)
        h = h.to(dtype).abs()
        value, _, weight = dense_step(weight, h, labels, ZLoss(), lr)
        close(factored.step(h, labels, ZLoss().of_sums, lr), value, tolerance)
        close(factored.weight(), weight, tolerance)
        weight = factored.weight()


@pytest.mark.parametrize("lr", [0.02, 0.5])
def test_conditioning_comes_by_itself(lr):
    factored = layer(condition_every=5)
    for step in range(20):
        factored.step(*batch(step, 6), ZLoss().of_sums, lr=lr)
    values = torch.linalg.svdvals(factored.u)
    assert values.min() >= 0.5 - 1e-12
    assert values.max() <= 2 + 1e-12


def test_shrinking_is_exact_weight_decay():
    factored = layer()
    factored.step(*batch(0, 4), ZLoss().of_sums, lr=0.3)
    weight = factored.weight()
    factored.shrink(0.9)
    close(factored.weight(), 0.9 * weight)
    h, labels = batch(1, 4)
    expected = dense_step(0.9 * weight, h, labels, ZLoss(), lr=0.3)
    factored.step(h, labels, ZLoss().of_sums, lr=0.3)
    close(factored.weight(), expected[2])


def test_state_continues_exactly():
    first, second = layer(condition_every=3), layer(condition_every=3, seed=9)
    for step in range(8):
        if step == 4:
            second.load_state_dict(copy.deepcopy(first.state_dict()))
        for factored in (first, second):
            factored.step(*batch(step, 3), ZLoss().of_sums, lr=0.4)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))


def test_refresh_changes_no_weight():
    factored = layer()
    for step in range(5):
        factored.step(*batch(step, 3), ZLoss().of_sums, lr=0.4)
    weight = factored.weight()
    factored.refresh()
    close(factored.weight(), weight)
    close(factored.gram, weight.T @ weight)
    assert torch.equal(factored.u, torch.eye(5, dtype=torch.float64))


def test_under_autocast_a_step_is_in_single_precision():
    first, second = FactoredOutput(5, 30, std=0.5), FactoredOutput(5, 30, std=0.5)
    h, labels = batch(0, 6)
    h = h.bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = first.step(h, labels, ZLoss().of_sums, lr=0.3)
    value.backward()
    assert value.dtype == torch.float32
    assert h.grad.dtype == torch.bfloat16
    expected = second.step(h.detach().float(), labels, ZLoss().of_sums, lr=0.3)
    close(value.detach(), expected)
    close(first.weight(), second.weight())


@pytest.mark.bad_input
def test_what_cannot_be_is_refused_and_changes_nothing():
    factored, (h, labels) = layer(), batch(0, 3)
    before = copy.deepcopy(factored.state_dict())
    ok = ZLoss().of_sums
    h_bad, far = h.clone(), labels.clone()
    h_bad[1, 2], far[2] = float("nan"), 30
    refused = [
        ((h_bad, labels, ok, 0.1), "h must be finite, found nan at row 1, column 2"),
        ((h[:, :4], labels, ok, 0.1), "h must have 5 columns, got 4"),
        ((h, far, ok, 0.1), r"labels must lie in 0..29, found 30 at row 2"),
        ((h, labels[:2], ok, 0.1), "labels must have 3 entries"),
        ((h, labels, ok, -0.1), r"lr must lie in \[0, inf\)"),
        ((h, labels, ZLoss(), 0.1), r"loss must be called with sums, as ZLoss\(\).of_sums is, got ZLoss\(\)"),
        ((h, labels, None, 0.1), "loss must be called with sums"),
        ((h, labels, ZLoss(reduction="none").of_sums, 0.1), r"loss must return a scalar, got shape \(3,\)"),
        ((1e200 * h, labels, SquaredErrorLoss().of_sums, 0.1), "must be finite"),
    ]
    for arguments, message in refused:
        with pytest.raises(InputError, match=message):
            factored.step(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), factored.state_dict().values()))
    with pytest.raises(InputError, match="weight must have 30 rows, got 3"):
        factored.load_weight(h)
    for settings_, message in (
        ({"features": 0}, "features must be at least 1"),
        ({"classes": 1}, "classes must be at least 2"),
        ({"std": 0.0}, "std must lie in"),
        ({"generator": 7}, "generator must be a torch.Generator, got int"),
        ({"condition_every": 0}, "condition_every must be at least 1"),
        ({"dtype": torch.bfloat16}, "dtype must be float32 or float64, got bfloat16"),
    ):
        with pytest.raises(InputError, match=message):
            FactoredOutput(**{"features": 5, "classes": 30, **settings_})
