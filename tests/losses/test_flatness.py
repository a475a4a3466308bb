"""The measure of sharpness: what it is on a quadratic, and that it leaves no trace (45-saf)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from trimtab.core.checks import InputError
from trimtab.losses import sharpness


class Point(nn.Module):
    """A point in the plane; the loss below is a quadratic of it."""

    def __init__(self, x, y):
        super().__init__()
        self.at = nn.Parameter(torch.tensor([x, y], dtype=torch.float64))

    def forward(self, x):
        return self.at.expand(len(x), 2)


def bowl(curvature):
    return lambda output, labels: (curvature * output.square()).sum(1).mean() / 2


@given(st.floats(0.1, 10), st.floats(0.01, 1), st.floats(0.5, 3))
def test_a_bowl_has_the_sharpness_of_its_curvature(curvature, rho, distance):
    data = [(torch.zeros(3), torch.zeros(3)), (torch.zeros(5), torch.zeros(5))]
    found = sharpness(Point(distance, 0.0), data, rho=rho, objective=bowl(curvature))
    assert found == pytest.approx(curvature * (rho * distance + rho**2 / 2))


def test_batches_weigh_by_their_samples_and_no_trace_is_left():
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    x = torch.randn(10, 4, generator=generator, dtype=torch.float64)
    y = torch.arange(10) % 3
    before = {name: value.clone() for name, value in model.state_dict().items()}
    whole = sharpness(model, [(x, y)])
    assert sharpness(model, [(x[:7], y[:7]), (x[7:], y[7:])]) == pytest.approx(whole)
    assert whole > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_where_the_loss_is_flat_nothing_is_sharp():
    assert sharpness(Point(0.0, 0.0), [(torch.zeros(3), torch.zeros(3))], objective=bowl(1.0)) == 0


@pytest.mark.bad_input
def test_what_cannot_be_measured_is_refused():
    model, batch = Point(1.0, 0.0), (torch.zeros(3), torch.zeros(3))
    for data, settings, message in (
        ([], {}, "data must yield batches"),
        (iter([batch]), {}, "data must yield batches each time"),
        ([batch], {"rho": 0.0}, r"rho must lie in \(0, inf\)"),
        ([batch, batch], {"objective": lambda output, _: output.sum() * torch.nan}, "batch at sample 0 gives nan"),
    ):
        with pytest.raises(InputError, match=message):
            sharpness(model, data, **{"objective": bowl(1.0), **settings})
    with pytest.raises(InputError, match="model must have parameters that require gradients"):
        sharpness(model.requires_grad_(False), [batch])
