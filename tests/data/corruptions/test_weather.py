"""Weather: plasma and brightness against formulas, snow step by step, frost in distribution."""

import colorsys

import numpy as np
import pytest
import torch

from trimtab.data.corruptions import base, corrupt, weather


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def reference_plasma(size, decay, draw):
    """Diamond-square on a torus, cell by cell."""
    height = np.zeros((size, size))
    step, wobble = size, 1.0
    while step >= 2:
        half, k = step // 2, size // step
        squares, across, down = ((2 * draw(k) - 1) * wobble for _ in range(3))
        for i in range(k):
            for j in range(k):
                y, x = i * step, j * step
                corners = [height[(y + a) % size, (x + b) % size] for a in (0, step) for b in (0, step)]
                height[y + half, x + half] = np.mean(corners) + squares[i, j]
        for i in range(k):
            for j in range(k):
                y, x = i * step, j * step
                ends = [height[y, x], height[y, (x + step) % size]]
                sides = [height[y + half, x + half], height[(y - half) % size, x + half]]
                height[y, x + half] = np.mean(ends + sides) + across[i, j]
                ends = [height[y, x], height[(y + step) % size, x]]
                sides = [height[y + half, x + half], height[y + half, (x - half) % size]]
                height[y + half, x] = np.mean(ends + sides) + down[i, j]
        step, wobble = half, wobble / decay**2
    return (height - height.min()) / (height.max() - height.min())


@pytest.mark.parametrize("decay", [3, 1.75])
def test_plasma_is_diamond_square(decay):
    generator = seeded(7)
    expected = reference_plasma(16, decay, lambda k: torch.rand(1, k, k, generator=generator).double().numpy()[0])
    out = weather.plasma(torch.zeros(1, 3, 12, 16), decay, seeded(7))
    assert out.shape == (1, 1, 12, 16)
    assert np.abs(out[0, 0].numpy() - expected[:12]).max() < 1e-5


def test_fog_mixes_the_image_with_plasma():
    images = torch.rand(2, 3, 32, 32, generator=seeded()) * torch.tensor([1.0, 0.5])[:, None, None, None]
    cloud = weather.plasma(images, 1.75, seeded(3))
    for out, image, field in zip(corrupt(images, "fog", 5, seeded(3)), images, cloud):
        expected = (image + 1.5 * field) * image.max() / (image.max() + 1.5)
        assert torch.allclose(out, expected, atol=1e-6)
        assert float(out.max()) <= float(image.max())


@pytest.mark.parametrize(("size", "severity", "more"), [(32, 1, 0.05), (32, 5, 0.3), (64, 3, 0.3)])
def test_brightness_raises_the_value_of_hsv(size, severity, more):
    images = torch.rand(1, 3, size, size, generator=seeded(), dtype=torch.float64)
    images[0, :, 0, :3] = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.3, 1.0], [0.0, 0.0, 1.0]])
    out = corrupt(images, "brightness", severity, seeded())
    for y in range(0, size, 5):
        for x in range(size):
            h, s, v = colorsys.rgb_to_hsv(*images[0, :, y, x].tolist())
            assert out[0, :, y, x].tolist() == pytest.approx(colorsys.hsv_to_rgb(h, s, min(v + more, 1)), abs=1e-9)


def test_snow_step_by_step():
    """Severity 2 at 32 pixels, from the same draws: flakes, their trail, the whitened image."""
    images = torch.rand(3, 3, 32, 32, generator=seeded(), dtype=torch.float64)
    generator = seeded(5)
    flakes = 0.1 + 0.2 * torch.randn(3, 1, 32, 32, generator=generator, dtype=torch.float64)
    flakes = flakes.masked_fill(flakes < 0.5, 0).clamp(0, 1)
    angles = torch.rand(3, generator=generator, dtype=torch.float64) * 90 - 135
    trail = base.drag(flakes, 10, 4.0, angles)
    luma = (0.299 * images[:, 0] + 0.587 * images[:, 1] + 0.114 * images[:, 2])[:, None]
    white = 0.9 * images + 0.1 * torch.maximum(images, luma * 1.5 + 0.5)
    expected = (white + trail + torch.rot90(trail, 2, (2, 3))).clamp(0, 1)
    assert torch.allclose(corrupt(images, "snow", 2, seeded(5)), expected, atol=1e-12)


def test_snow_falls_down():
    """Flakes smear along the vertical more than along the horizontal."""
    out = corrupt(torch.zeros(100, 1, 32, 32), "snow", 4, seeded())
    down = (out[:, :, 1:] - out[:, :, :-1]).abs().mean()
    across = (out[..., 1:] - out[..., :-1]).abs().mean()
    assert float(down) < 0.8 * float(across)


@pytest.mark.parametrize("size", [32, 100])
def test_panes_have_the_photographs_brightness_and_spread(size):
    """In crops of the reference's five photographs the mean is 0.63 (0.15 between crops), the spread within 0.09."""
    panes = weather.pane(torch.zeros(400 if size == 32 else 150, 3, size, size), seeded()).mean(1)
    assert abs(float(panes.mean()) - 0.63) < 0.06
    assert abs(float(panes.mean((1, 2)).std()) - 0.15) < 0.03
    assert abs(float(panes.std((1, 2)).mean()) - 0.09) < 0.015


def test_panes_are_bluish_and_have_texture():
    panes = weather.pane(torch.zeros(200, 3, 32, 32), seeded())
    red, green, blue = panes.mean((0, 2, 3)).tolist()
    assert red < green < blue
    fields = panes.mean(1) - panes.mean((1, 2, 3))[:, None, None]
    neighbours = (fields[..., 1:] * fields[..., :-1]).mean() / fields.square().mean()
    assert 0.2 < float(neighbours) < 0.6  # 0.33 in the photographs at this size


def test_frost_is_a_weighted_sum():
    images = torch.rand(2, 3, 32, 32, generator=seeded())
    expected = (0.75 * images + 0.45 * weather.pane(images, seeded(2))).clamp(0, 1)
    assert torch.allclose(corrupt(images, "frost", 5, seeded(2)), expected, atol=1e-6)
