"""Certified training, its initialisation and its schedule: slug 39-fast-certified-ibp."""

from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from trimtab.core.checks import InputError
from trimtab.losses import CertifiedIBP, SmoothedEps, ibp_init_
from trimtab.losses.certified import _warm_up
from trimtab.nn import Interval

GOLDEN = Path(__file__).parents[1] / "golden" / "39-fast-certified-ibp"


def files(array):
    found = [path for path in sorted(GOLDEN.glob("*.npz")) if array in np.load(path).files]
    assert found
    return pytest.mark.parametrize("path", found, ids=lambda path: path.stem)


def network(arrays, dtype):
    """The card's convolutional network, as wide as the arrays say."""
    into, mid, out = (arrays[f"init__{i}_weight"].shape for i in (0, 3, 7))
    model = nn.Sequential(
        nn.Conv2d(into[1], into[0], 3, padding=1), nn.BatchNorm2d(into[0]), nn.ReLU(),
        nn.Conv2d(mid[1], mid[0], 3, stride=2, padding=1), nn.BatchNorm2d(mid[0]), nn.ReLU(), nn.Flatten(),
        nn.Linear(out[1], out[0]), nn.BatchNorm1d(out[0]), nn.ReLU(), nn.Linear(out[0], len(arrays["init__10_bias"])),
    )  # fmt: skip
    state = {k[6:].replace("_", ".", 1): torch.from_numpy(v) for k, v in arrays.items() if k.startswith("init__")}
    model.to(dtype).load_state_dict(state)
    return model


@pytest.mark.golden
@files("relu0_lower")
def test_the_authors_step(path):
    arrays = dict(np.load(path))
    x, y = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"])
    rtol = 1e-9 if x.dtype == torch.float64 else 1e-4
    with torch.random.fork_rng(devices=[]):
        model = network(arrays, x.dtype)
    loss = CertifiedIBP(
        model, eps=float(arrays["max_eps"]), weight=float(arrays["lam"]), tolerance=float(arrays["tol"])
    )
    eps, widest = float(arrays["eps"]), max(np.abs(arrays[name]).max() for name in arrays if name.startswith("grad__"))

    def near(name, value, atol=0.0):
        expected = torch.from_numpy(np.asarray(arrays[name]))
        torch.testing.assert_close(value.detach().to(expected.dtype), expected, rtol=rtol, atol=max(atol, rtol * 1e-3))

    twin = deepcopy(loss)
    natural, robust, tightness, balance, margins = twin.terms(x, y, eps)
    for name, value in {
        "regular_ce": natural, "robust_loss": robust, "L_tightness": tightness, "L_relu": balance,
        "robust_err": (margins < 0).any(1).double().mean(),
    }.items():  # fmt: skip
        near(name, value)
    _, bounds, _ = deepcopy(loss)._bounded(x, y, eps)
    near("regular_err", (bounds.logits.argmax(1) != y).double().mean())
    relus = [name for name in arrays if name.startswith("relu") and name.endswith("_lower")]
    assert len(relus) == len(bounds.before_relu)
    for i, layer in enumerate(bounds.before_relu):
        near(f"relu{i}_lower", layer.lower, rtol * 10)
        near(f"relu{i}_upper", layer.upper, rtol * 10)

    value = loss(x, y, eps)
    value.backward()
    near("loss", value)
    near("reg", value - (robust if eps else natural), rtol * abs(float(value.detach())))
    for name, parameter in model.named_parameters():
        near(f"grad__{name.replace('.', '_')}", parameter.grad, rtol * widest)
    for name, buffer in model.named_buffers():
        if "running" in name:
            near(f"after__{name.replace('.', '_')}", buffer)
    rates = loss.error_rates([(x, y)], float(arrays["eval_eps"]))
    assert rates == (pytest.approx(float(arrays["eval_err"])), pytest.approx(float(arrays["eval_robust_err"])))
    model.eval()
    evaluated = loss.terms(x, y, float(arrays["eval_eps"]))
    near("eval_ce", evaluated.natural)
    near("eval_robust_loss", evaluated.robust)


@pytest.mark.golden
@files("a_meta")
def test_the_authors_schedule(path):
    arrays = np.load(path)
    for name in arrays.files:
        if not name.endswith("_meta"):
            eps, start, length, batches, _, middle, power = arrays[f"{name}_meta"].tolist()
            schedule = SmoothedEps(
                eps, start=int(start), length=int(length), batches=int(batches), middle=middle, power=power
            )
            np.testing.assert_allclose([schedule.step() for _ in arrays[name]], arrays[name], rtol=1e-12, atol=1e-15)


def perceptron(seed=0, norm=True):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Linear(6, 12), *([nn.BatchNorm1d(12)] if norm else []), nn.ReLU(), nn.Linear(12, 3)]
        return nn.Sequential(*layers).double()


def batch(seed=0, n=12):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 6, generator=generator, dtype=torch.float64), torch.arange(n) % 3


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), eps=st.floats(0.001, 0.2))
def test_what_is_certified_cannot_be_attacked(seed, eps):
    model, (x, y) = perceptron(seed).eval(), batch(seed)
    loss = CertifiedIBP(model, eps=0.2)
    margins = loss.terms(x, y, eps).margins
    certified = (margins >= 0).all(1)
    images = x.clone().requires_grad_(True)
    F.cross_entropy(model(images), y).backward()
    attacked = (x + eps * images.grad.sign()).clamp(0, 1)
    assert (model(attacked).argmax(1) == y)[certified].all()
    rates = loss.error_rates([(x[:5], y[:5]), (x[5:], y[5:])], eps)
    assert rates.verified_error == pytest.approx(1 - float(certified.double().mean()))
    assert rates.clean_error <= rates.verified_error


def test_boxes_end_where_pixels_do():
    x = torch.tensor([[[[0.0]], [[0.5]]]], dtype=torch.float64)
    mean, std = torch.tensor([0.2, 0.5]), torch.tensor([0.5, 0.25])
    loss = CertifiedIBP(perceptron(), eps=0.1, mean=mean.tolist(), std=std.tolist())
    normal = (x - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    box = loss._box(normal, 0.1)
    torch.testing.assert_close(box.lower.flatten() * std + mean, torch.tensor([0.0, 0.4]), check_dtype=False)
    torch.testing.assert_close(box.upper.flatten() * std + mean, torch.tensor([0.1, 0.6]), check_dtype=False)


def layer(*ends):
    """A layer of units between these ends."""
    lower, upper = torch.tensor(ends, dtype=torch.float64).T
    return Interval((lower + upper) / 2, (lower + upper) / 2, (upper - lower) / 2)


@pytest.mark.parametrize(
    ("ends", "imbalance"),
    [
        ([(1, 2), (-2, -1)], 0.0),  # even
        ([(-2, -1), (-3, -1)], 2.0),  # none active: in full
        ([(1, 2), (1, 3)], 0.0),  # none inactive: left out
        ([(-1, 2), (-2, 1)], 0.0),  # neither
        ([(5, 6), (-2, -1)], 2 * (0.5 - 1.5 / 5.5)),  # a ratio of the means of 3 / 11, variances alike
    ],
)
def test_layers_of_one_kind_of_unit(ends, imbalance):
    bounds = layer(*ends)
    centre = bounds.centre.requires_grad_(True)
    tightness, balance = _warm_up(bounds, [Interval(centre, centre, bounds.radius)] * 2, 0.5)
    assert float(tightness.detach()) == 0.0
    assert float(balance.detach()) == pytest.approx(imbalance)
    if balance.requires_grad:
        balance.backward()
        assert centre.grad.isfinite().all()


def test_wide_bounds_are_punished_up_to_one():
    narrow, wide = layer((0, 1)), layer((0, 4))
    assert _warm_up(narrow, [wide, narrow], 0.5)[0] == pytest.approx((1 - 0.25 / 0.5) / 2)


def test_the_objective_is_natural_at_zero_and_has_no_regulariser_at_the_full_radius():
    loss, (x, y) = CertifiedIBP(perceptron().eval(), eps=0.1, weight=0.7), batch()
    terms = loss.terms(x, y, 0.1)
    assert torch.equal(loss(x, y), terms.robust)
    terms = loss.terms(x, y, 0.0)
    torch.testing.assert_close(loss(x, y, 0.0), terms.natural + 0.7 * (terms.tightness + terms.balance))
    terms = loss.terms(x, y, 0.05)
    torch.testing.assert_close(loss(x, y, 0.05), terms.robust + 0.35 * (terms.tightness + terms.balance))


def test_measuring_leaves_the_model_as_it_was():
    model, data = perceptron(), batch()
    model[1].eval()
    before = deepcopy(model.state_dict())
    CertifiedIBP(model, eps=0.1).error_rates([data])
    assert model.training
    assert not model[1].training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_training_certifies():
    x, y = batch(n=60)
    y = (3 * x[:, 0]).long()
    model = ibp_init_(perceptron(), generator=torch.Generator().manual_seed(0))
    loss = CertifiedIBP(model, eps=0.03)
    before = loss.error_rates([(x, y)]).verified_error
    schedule, optimizer = (
        SmoothedEps(0.03, start=1, length=30, batches=1),
        torch.optim.Adam(model.parameters(), lr=0.02),
    )
    for _ in range(80):
        optimizer.zero_grad()
        loss(x, y, schedule.step()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10)
        optimizer.step()
    assert loss.error_rates([(x, y)]).verified_error < before - 0.3


class Residual(nn.Module):
    def __init__(self, act=True):
        super().__init__()
        self.first, self.left, self.right = (nn.Linear(200, 200) for _ in range(3))
        self.after, self.head = nn.Linear(200, 200), nn.Linear(200, 2)
        self.act = nn.ReLU() if act else nn.Sequential(nn.BatchNorm1d(200), nn.ReLU())

    def forward(self, x):
        x = F.relu(self.first(x))
        return self.head(F.relu(self.after(self.act(self.left(x) + self.right(x)))))


@pytest.mark.parametrize(("act", "share"), [(True, 0.5), (False, 1.0)])
def test_weights_after_a_sum_are_halved_where_one_operation_lies_between(act, share):
    with torch.random.fork_rng(devices=[]):
        model = Residual(act)
    head = model.head.weight.clone(), model.first.bias.clone()
    assert ibp_init_(model, generator=torch.Generator().manual_seed(0)) is model
    usual = (2 * np.pi) ** 0.5 / 200
    for name in ("first", "left", "right", "after"):
        wanted = usual * (share if name == "after" else 1)
        assert getattr(model, name).weight.std().item() == pytest.approx(wanted, rel=0.03)
    assert torch.equal(model.head.weight, head[0])
    assert torch.equal(model.first.bias, head[1])


def test_without_a_generator_the_weights_are_the_same_each_time():
    first, second = (ibp_init_(perceptron(seed)) for seed in (0, 1))
    assert torch.equal(first[0].weight, second[0].weight)


def test_convolutions_count_what_they_see():
    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(nn.Conv2d(8, 64, 3, groups=2), nn.BatchNorm2d(64), nn.Flatten(), nn.Linear(64, 2))
    ibp_init_(model, generator=torch.Generator().manual_seed(0))
    assert model[0].weight.std().item() == pytest.approx((2 * np.pi) ** 0.5 / 36, rel=0.05)
    assert (model[1].weight == 1).all()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"eps": 0.2}, r"eps must lie in \[0, 0.1\]"),
        ({"eps": -0.1}, "eps must lie in"),
        ({"images": torch.full((3, 6), 1.5)}, r"images before normalisation must lie in .*found 1.5"),
        ({"images": torch.zeros(6)}, r"images must be floating point of shape \(n, ...\)"),
        ({"images": torch.zeros(3, 6, dtype=torch.uint8)}, "images must be floating point"),
        ({"labels": torch.tensor([0, 1, 3])}, "labels must lie in 0..2, found 3 at row 2"),
        ({"labels": torch.tensor([0, 1])}, "labels must have 3 entries"),
    ],
)
def test_bad_batches_are_refused(change, told):
    given_ = {"images": torch.zeros(3, 6), "labels": torch.tensor([0, 1, 2]), "eps": 0.1} | change
    with pytest.raises(InputError, match=told):
        CertifiedIBP(perceptron(), eps=0.1)(**given_)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"eps": 0.0}, "eps must lie in"),
        ({"weight": -1}, "weight must lie in"),
        ({"tolerance": 0}, "tolerance must lie in"),
        ({"std": (0.2, 0.0)}, "std must be positive"),
        ({"mean": float("nan")}, "mean must lie in"),
        ({"pixels": (1, 0)}, "pixels must be a lower and a higher number"),
    ],
)
def test_bad_settings_are_refused(change, told):
    with pytest.raises(InputError, match=told):
        CertifiedIBP(**({"model": perceptron()} | change))


@pytest.mark.parametrize("wrap", [lambda layer: layer, nn.Sequential])
def test_a_linear_classifier_has_no_warm_up_and_exact_bounds(wrap):
    layer = perceptron()[0]
    images = torch.rand(3, 6, generator=torch.Generator().manual_seed(0), dtype=layer.weight.dtype)
    labels = torch.tensor([0, 1, 2])
    loss = CertifiedIBP(wrap(layer), eps=0.1, pixels=None)
    terms = loss.terms(images, labels, 0.1)
    ahead = layer.weight[labels][:, None] - layer.weight
    logits = layer(images)
    worst = logits.gather(1, labels[:, None]) - logits - 0.1 * ahead.abs().sum(2)
    torch.testing.assert_close(terms.margins, worst)
    assert terms.tightness == terms.balance == 0
    torch.testing.assert_close(loss(images, labels, 0.0), nn.functional.cross_entropy(logits, labels))


def convolutional():
    with torch.random.fork_rng(devices=[]):
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("model", "shape", "told"),
    [
        (perceptron(), (3, 5), r"0 \(Linear\) takes a size of 6 in axis -1, its input is \(3, 5\)"),
        (
            convolutional(),
            (3, 2, 8, 8),
            r"0 \(Conv2d\) takes 4 axes and a size of 1 in axis 1, its input is \(3, 2, 8, 8\)",
        ),
        (convolutional(), (3, 1, 8), r"0 \(Conv2d\) takes 4 axes and a size of 1 in axis 1"),
        (convolutional(), (3, 1, 9, 9), r"3 \(Linear\) takes a size of 72 in axis -1, its input is \(3, 98\)"),
    ],
)
def test_images_that_do_not_fit_the_model_are_refused(model, shape, told):
    with pytest.raises(InputError, match=f"inputs must fit the model: {told}"):
        CertifiedIBP(model)(torch.zeros(shape), torch.tensor([0, 1, 2]))


@pytest.mark.bad_input
@pytest.mark.parametrize("name", ["mean", "std"])
@pytest.mark.parametrize("pixels", [None, (0.0, 1.0)])
def test_a_normalisation_of_other_channels_than_the_images_is_refused(name, pixels):
    loss = CertifiedIBP(convolutional(), pixels=pixels, **{name: (0.1, 0.2)})
    told = rf"{name} must be one number or 1, as images of shape \(3, 1, 8, 8\) have on axis 1, got 2"
    with pytest.raises(InputError, match=told):
        loss(torch.zeros(3, 1, 8, 8), torch.tensor([0, 1, 2]))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("loader", "told"),
    [
        (7, "loader must yield batches, as a DataLoader does, got int"),
        (TensorDataset(torch.zeros(3, 6), torch.arange(3)), "as a DataLoader does, got TensorDataset"),
        ([torch.zeros(3, 6)], "loader must yield labels, a batch came without"),
        ([(torch.zeros(3, 6), torch.arange(3), 0)], r"loader must yield inputs, \(inputs, labels\)"),
    ],
)
def test_what_is_no_loader_is_refused(loader, told):
    with pytest.raises(InputError, match=told):
        CertifiedIBP(perceptron()).error_rates(loader)


@pytest.mark.bad_input
def test_what_is_missing_is_told():
    with pytest.raises(InputError, match="at least one batch"):
        CertifiedIBP(perceptron()).error_rates([])
    with pytest.raises(InputError, match="at least two layers"):
        ibp_init_(perceptron()[:1])
