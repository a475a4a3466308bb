"""Which precision sums are taken in, by device."""

import pytest
import torch

from trimtab.core import precision
from trimtab.losses import (
    MMCE,
    DirectCoverage,
    camera_bias,
    coverage_factor,
    coverage_loss,
    pass_at_n_unbiased,
    perspective,
    sharpness,
)
from trimtab.losses.nearest import nearest


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.float64), ("cuda", torch.float64), ("mps", torch.float32)])
def test_apples_gpus_have_no_float64(device, dtype):
    assert precision.exact(torch.device(device)) == dtype


def test_doubled():
    x = torch.arange(3)
    assert torch.equal(precision.doubled(x), x.double())
    y = x.double()
    assert precision.doubled(y) is y


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def linear():
    layer = torch.nn.utils.skip_init(torch.nn.Linear, 3, 4)
    layer.load_state_dict({"weight": random(4, 3), "bias": random(4)})
    return layer


BODY, PLACES = random(20, 5, 3) / 2, torch.tensor([[0.9, 0.0, 0.1]]).expand(20, 3)
VALUES = {
    "MMCE": lambda: MMCE()(random(9, 4), torch.arange(9) % 4),
    "DirectCoverage": lambda: DirectCoverage(samples=8)(random(9, 4), torch.arange(9) % 4),
    "coverage_factor": lambda: coverage_factor(torch.linspace(0, 1, 9), 8),
    "coverage_loss": lambda: coverage_loss(-torch.logspace(-2, 3, 60), 8),
    "pass_at_n_unbiased": lambda: pass_at_n_unbiased(9, torch.arange(9), 4),
    "camera_bias": lambda: camera_bias(BODY, perspective(BODY + 0.1, PLACES, focal=500.0), focal=500.0),
    "sharpness": lambda: torch.tensor(sharpness(linear(), [(random(9, 3), torch.arange(9) % 4)])),
    "nearest": lambda: nearest(random(9, 2), random(7, 2) + 1, 3),
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_what_is_computed_in_double_is_much_the_same_without(monkeypatch, value):
    expected = value()
    monkeypatch.setattr(precision, "exact", lambda device: torch.float32)
    found = value()
    assert found.isfinite().all()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5, check_dtype=False)
