"""Interval bounds contain what they bound, and say where they cannot."""

import operator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from trimtab.core.checks import InputError
from trimtab.nn import Interval, IntervalBounds

seeds = st.integers(0, 10_000)


class Residual(nn.Module):
    """Two branches, in the ways that people write them."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.left, self.right = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.pool, self.act, self.drop = nn.MaxPool2d(2), nn.Tanh(), nn.Dropout(0.5)
        self.between, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x)
        x = torch.relu(self.left(x) + self.right(x))
        x += x
        x = self.act(F.avg_pool2d(self.pool(x), 2, stride=1, padding=1).mean((2, 3))[:, :4])
        x = torch.flatten(x.view(x.size(0), -1).reshape(x.shape[0], 4, 1), 1)
        return self.head(self.drop(F.relu(self.between(x), inplace=True)))


def built(make, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().double()


def perceptron():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 3))


def convolutional():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, padding_mode="circular"), nn.ReLU(), nn.BatchNorm2d(4, affine=False),
        nn.AvgPool2d(2), nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


def boxed(model, seed, n=5, radius=0.1):
    generator = torch.Generator().manual_seed(seed)
    shape = (n, 4) if isinstance(model[0] if isinstance(model, nn.Sequential) else None, nn.Linear) else (n, 2, 6, 6)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return Interval(x, x, radius * torch.rand(shape, generator=generator, dtype=torch.float64)), generator


MODELS = pytest.mark.parametrize("make", [perceptron, convolutional, Residual])


@MODELS
@settings(max_examples=10)
@given(seed=seeds)
def test_whatever_lies_in_the_box_comes_out_between_the_bounds(make, seed):
    model = built(make, seed).eval()
    box, generator = boxed(model, seed)
    bounds = IntervalBounds(model)(box)
    assert (bounds.lower <= bounds.upper).all()
    torch.testing.assert_close(bounds.clean, model(box.clean))
    for corner in (True, False):
        at = torch.rand(box.clean.shape, generator=generator, dtype=torch.float64)
        at = 2 * (at > 0.5) - 1 if corner else 2 * at - 1
        outputs = model(box.centre + at * box.radius)
        assert (outputs >= bounds.lower - 1e-12).all()
        assert (outputs <= bounds.upper + 1e-12).all()


@MODELS
@settings(max_examples=10)
@given(seed=seeds)
def test_margins_are_lower_bounds_and_tighter_than_differences_of_bounds(make, seed):
    model = built(make, seed).eval()
    box, generator = boxed(model, seed)
    labels = torch.randint(3, (len(box.clean),), generator=generator)
    network = IntervalBounds(model)
    bounds, margins = network(box), network.margins(box, labels)
    assert (margins.lower.gather(1, labels[:, None]) == 0).all()
    loose = bounds.lower.gather(1, labels[:, None]) - bounds.upper
    assert (margins.lower >= loose - 1e-12).all()
    logits = model(box.centre - box.radius)
    assert (logits.gather(1, labels[:, None]) - logits >= margins.lower - 1e-12).all()


@MODELS
def test_a_box_without_width_gives_the_outputs(make):
    model = built(make).eval()
    box, _ = boxed(model, 0, radius=0.0)
    bounds = IntervalBounds(model)(box)
    torch.testing.assert_close(bounds.lower, model(box.clean))
    torch.testing.assert_close(bounds.upper, model(box.clean))


def test_one_layer_is_bounded_exactly():
    model = built(lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    box = Interval(*torch.tensor([[[0.3, -0.2, 0.1]], [[0.3, -0.2, 0.1]], [[0.1, 0.2, 0.0]]], dtype=torch.float64))
    before = IntervalBounds(model).margins(box, torch.tensor([0])).before_relu[0]
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 3) * box.radius + box.centre
    torch.testing.assert_close(before.lower[0], model[0](corners).amin(0))
    torch.testing.assert_close(before.upper[0], model[0](corners).amax(0))


def test_in_training_statistics_are_of_the_inputs_and_seen_once():
    model, plain = built(perceptron), built(perceptron)
    box, _ = boxed(model, 1)
    logits = IntervalBounds(model)(box).clean
    torch.testing.assert_close(logits, plain(box.clean))
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, dict(plain.named_buffers())[name]), name


def test_narrow_boxes_keep_their_width_in_single_precision():
    model = built(lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))).float()
    x = torch.tensor([[1.0, 2.0, 3.0]])
    found = IntervalBounds(model)(Interval(x, x, torch.full_like(x, 1e-6))).radius
    exact = IntervalBounds(model.double())(Interval(*(part.double() for part in (x, x, torch.full_like(x, 1e-6)))))
    torch.testing.assert_close(found.double(), exact.radius, rtol=1e-5, atol=0)


class Between(nn.Module):
    """Two layers, and a function of both branches between them."""

    def __init__(self, function):
        super().__init__()
        self.first, self.head, self.function = nn.Linear(4, 4), nn.Linear(4, 3), function

    def forward(self, x):
        return self.head(input=self.function(self.first(x), x))


@pytest.mark.parametrize(
    ("named", "plain"),
    [
        (lambda a, b: torch.add(a, other=b), operator.add),
        (lambda a, b: torch.add(input=a, other=b), operator.add),
        (lambda a, b: a.add(other=b), operator.add),
        (lambda a, b: torch.relu(input=a), lambda a, b: torch.relu(a)),
        (lambda a, b: F.relu(input=a, inplace=False), lambda a, b: torch.relu(a)),
        (lambda a, b: torch.flatten(input=a, start_dim=1), lambda a, b: a),
        (lambda a, b: a.view(size=(b.size(dim=0), 4)), lambda a, b: a),
    ],
)
def test_operands_may_be_given_by_name(named, plain):
    box, _ = boxed(built(perceptron), 0)
    found = IntervalBounds(built(lambda: Between(named)))(box)
    expected = IntervalBounds(built(lambda: Between(plain)))(box)
    for part, other in zip(found, expected):
        assert torch.equal(part, other)


@pytest.mark.bad_input
@pytest.mark.parametrize("name", ["alpha", "out"])
def test_arguments_without_a_rule_are_refused(name):
    model = nn.Sequential(built(lambda: Between(lambda a, b: torch.add(a, b, **{name: b}))))
    with pytest.raises(InputError, match=f"model must call add in 0 with .* unexpected keyword argument '{name}'"):
        IntervalBounds(model)


@pytest.mark.bad_input
def test_boxes_and_labels_that_are_none_are_refused():
    network, x = IntervalBounds(built(lambda: nn.Sequential(nn.Linear(2, 3)))), torch.zeros(2, 2, dtype=torch.float64)
    width = torch.tensor([[0.1, 0.1], [0.1, -0.1]], dtype=torch.float64)
    with pytest.raises(InputError, match=r"box.radius must lie in \[0, inf\], found -0.1 at row 1, column 1"):
        network(Interval(x, x, width))
    with pytest.raises(InputError, match=r"box must have parts of one shape, got \(2, 2\), \(1, 2\), \(2, 2\)"):
        network(Interval(x, x[:1], x))
    with pytest.raises(InputError, match=r"labels must lie in 0..2, found 3 at row 1"):
        network.margins(Interval(x, x, x), torch.tensor([0, 3]))


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Shifted(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(2, 2)

    def forward(self, x):
        return self.head(x + 1)


class TwoInputs(Shifted):
    def forward(self, x, y):
        return self.head(x)


class Device(Shifted):
    def forward(self, x):
        return self.head(x.to(x.device))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 2)), r"interval rule only, 0 \(LayerNorm\) has none"),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "must end in an nn.Linear"),
        (nn.Sequential, "must end in an nn.Linear"),
        (Branching, "cannot be traced"),
        (TwoInputs, "cannot be traced by torch.fx with one input: .* missing 1 required positional argument: 'y'"),
        (Device, "must hold operations with an interval rule only, to in the model itself has none"),
        (nn.GELU, r"interval rule only, the model itself \(GELU\) has none"),
        (lambda: nn.Sequential(nn.Sequential(Shifted(), nn.Linear(2, 2)), Device()), "only, to in 1 has none"),
    ],
)
def test_models_that_cannot_be_bounded_are_refused(make, told):
    with pytest.raises(InputError, match=told):
        IntervalBounds(built(make))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("make", "n", "told"),
    [
        (Shifted, 3, "a sum with something else"),
        (lambda: nn.Sequential(nn.Dropout(), nn.Linear(2, 2)), 3, "must not drop units"),
        (lambda: nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2)), 1, "more than one value a channel"),
    ],
)
def test_what_cannot_be_bounded_is_told_when_it_happens(make, n, told):
    x = torch.zeros(n, 2, dtype=torch.float64)
    with pytest.raises(InputError, match=told):
        IntervalBounds(built(make))(Interval(x, x, x))
