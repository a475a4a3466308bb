"""Noise, in distribution: the moments that the formulas promise."""

import pytest
import torch

from trimtab.data.corruptions import corrupt


def grey(value, size=32, n=50):
    return torch.full((n, 3, size, size), value)


@pytest.mark.parametrize(("size", "scale"), [(32, 0.10), (64, 0.18)])
def test_gaussian_noise(size, scale):
    change = corrupt(grey(0.5, size), "gaussian_noise", 5, torch.Generator().manual_seed(0)) - 0.5
    assert abs(float(change.mean())) < 0.001
    assert abs(float(change.std()) / scale - 1) < 0.02
    # a normal distribution has 68.3 % of its mass within one standard deviation
    assert abs(float((change.abs() < scale).double().mean()) - 0.683) < 0.005


@pytest.mark.parametrize(("severity", "photons"), [(1, 500), (5, 50)])
@pytest.mark.parametrize("value", [0.1, 0.5])
def test_shot_noise(severity, photons, value):
    out = corrupt(grey(value), "shot_noise", severity, torch.Generator().manual_seed(0))
    assert abs(float(out.mean()) - value) < 0.001
    assert abs(float(out.var()) / (value / photons) - 1) < 0.03
    counts = out * photons
    assert torch.allclose(counts, counts.round(), atol=1e-3)


@pytest.mark.parametrize(("size", "severity", "share"), [(32, 1, 0.01), (32, 5, 0.07), (64, 5, 0.14)])
def test_impulse_noise(size, severity, share):
    out = corrupt(grey(0.5, size, 300), "impulse_noise", severity, torch.Generator().manual_seed(0))
    for value in (0.0, 1.0):
        assert abs(float((out == value).double().mean()) / (share / 2) - 1) < 0.06
    assert abs(float((out == 0.5).double().mean()) - (1 - share)) < 0.002
    # each channel by itself: two channels of a pixel are hit together by chance only
    hit = (out != 0.5).double()
    assert abs(float((hit[:, 0] * hit[:, 1]).mean()) - share**2) < 0.002
