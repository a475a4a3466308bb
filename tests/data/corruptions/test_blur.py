"""Blur, against formulas written once more in numpy and scipy."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from trimtab.data.corruptions import base, blur, corrupt


def image(h=32, w=32, n=1, seed=0):
    smooth = ndimage.gaussian_filter(np.random.default_rng(seed).random((n, 3, h, w)), (0, 0, 1, 1))
    return torch.from_numpy((smooth - smooth.min()) / (smooth.max() - smooth.min()))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("size", "severity", "radius", "alias"),
    [(32, 1, 0.3, 0.4), (32, 5, 1.5, 0.1), (64, 4, 2.5, 0.01), (224, 4, 8, 0.5), (224, 5, 10, 0.5)],
)
def test_defocus_blur(size, severity, radius, alias):
    reach = max(8, int(radius))
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disk = (x**2 + y**2 <= radius**2).astype(float)
    disk /= disk.sum()
    # OpenCV's Gaussian: 3 taps up to radius 8, 5 from there, mirrored at the border without repeating it
    taps = np.arange(-1, 2) if radius <= 8 else np.arange(-2, 3)
    bell = np.exp(-(taps**2) / (2 * alias**2))
    bell /= bell.sum()
    for axis in (0, 1):
        disk = ndimage.correlate1d(disk, bell, axis=axis, mode="mirror")
    pixels = image(size, size)
    expected = np.stack([ndimage.correlate(c, disk, mode="mirror") for c in pixels[0].numpy()])
    out = corrupt(pixels, "defocus_blur", severity, seeded())[0].numpy()
    assert np.abs(out - expected.clip(0, 1)).max() < 1e-9


@pytest.mark.parametrize(("sigma", "truncate", "mode"), [(0.4, 4.0, "nearest"), (1.5, 4.0, "nearest"),
                                                          (0.9, 3.0, "reflect"), (40.0, 3.0, "reflect"),
                                                          (0.0, 3.0, "reflect")])  # fmt: skip
def test_smooth_is_scipys(sigma, truncate, mode):
    pixels = image(20, 31)
    expected = ndimage.gaussian_filter(pixels[0].numpy(), (0, sigma, sigma), truncate=truncate, mode=mode)
    out = base.smooth(pixels, sigma, truncate=truncate, mirror=mode == "reflect")[0].numpy()
    assert np.abs(out - expected).max() < 1e-12


def walk(offsets, reach):
    """The reference's loop, with its swap that copies: pixel by pixel, from the last to the first."""
    dy, dx = offsets
    h, w = dy.shape
    place = np.arange(h * w).reshape(h, w)
    for row in range(h - reach, reach, -1):
        for column in range(w - reach, reach, -1):
            place[row, column] = place[row + dy[row, column], column + dx[row, column]]
    return place.ravel()


@pytest.mark.parametrize(("reach", "h", "w"), [(1, 8, 8), (1, 32, 20), (2, 24, 24), (4, 40, 33), (7, 20, 20)])
def test_glass_shuffle_is_the_walk_over_the_pixels(reach, h, w):
    offsets = torch.randint(-reach, reach, (2, 3, h, w), generator=seeded())
    out = blur.shuffle(offsets, reach)
    for i in range(3):
        assert np.array_equal(out[i].numpy(), walk(offsets[:, i].numpy(), reach))


def test_glass_shuffle_leaves_a_small_image_alone():
    still = blur.shuffle(torch.full((2, 1, 8, 8), -4), 4)
    assert torch.equal(still[0], torch.arange(64))


def test_glass_blur_from_the_same_draws():
    """Severity 5 at 64 pixels: two rounds with a reach of 2 pixels, between two blurs of 0.9."""
    pixels = image(64, 64, n=2)
    generator = seeded(3)
    expected = ndimage.gaussian_filter(pixels.numpy(), (0, 0, 0.9, 0.9), mode="nearest")
    for _ in range(2):
        draws = torch.rand(2, 2, 64, 64, generator=generator, dtype=torch.float64).numpy()
        offsets = np.floor(draws * 4 - 2).astype(int)
        for i in range(2):
            expected[i] = expected[i].reshape(3, -1)[:, walk(offsets[:, i], 2)].reshape(3, 64, 64)
    expected = ndimage.gaussian_filter(expected, (0, 0, 0.9, 0.9), mode="nearest")
    assert np.abs(corrupt(pixels, "glass_blur", 5, seeded(3)).numpy() - expected).max() < 1e-9


def test_glass_blur_moves_pixels_no_farther_than_its_reach_allows():
    """Severity 4 at 32 pixels: two rounds of at most one pixel up or left, between blurs of one pixel each."""
    pixels = torch.zeros(1, 1, 32, 32)
    pixels[..., 16, 16] = 1
    out = corrupt(pixels, "glass_blur", 4, seeded())
    assert float(out.sum()) > 0
    assert float(out[..., 12:21, 12:21].sum()) == pytest.approx(float(out.sum()))


@pytest.mark.parametrize("degrees", [0.0, 45.0, -33.0, -90.0, -135.0, 17.0])
@pytest.mark.parametrize(("radius", "sigma"), [(6, 1.0), (9, 2.5), (15, 12.0)])
def test_drag_is_imagemagicks_motion_blur(degrees, radius, sigma):
    pixels = image(20, 24)
    taps = 2 * radius + 1
    weights = np.exp(-(np.arange(taps) ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    padded = np.pad(pixels[0].numpy(), ((0, 0), (taps, taps), (taps, taps)), mode="edge")
    expected = np.zeros((3, 20, 24))
    for i, weight in enumerate(weights):
        down = math.ceil(i * math.sin(math.radians(degrees)) - 0.5)
        right = math.ceil(i * math.cos(math.radians(degrees)) - 0.5)
        expected += weight * padded[:, taps + down : taps + down + 20, taps + right : taps + right + 24]
    out = base.drag(pixels, radius, sigma, torch.tensor([degrees], dtype=torch.float64))[0].numpy()
    assert np.abs(out - expected).max() < 2e-6


def test_motion_blur_from_the_same_draws():
    """Severity 5 at 64 pixels: 25 taps of half a Gaussian of standard deviation 3."""
    pixels = image(64, 64, n=3)
    degrees = torch.rand(3, generator=seeded(3), dtype=torch.float64) * 90 - 45
    expected = base.drag(pixels, 12, 3.0, degrees)
    assert torch.allclose(corrupt(pixels, "motion_blur", 5, seeded(3)), expected.clamp(0, 1), atol=1e-12)


def test_motion_blur_draws_directions_within_45_degrees_of_the_horizontal():
    """A bright point leaves a trail to its left, never steeper than its own diagonal."""
    pixels = torch.zeros(200, 1, 32, 32)
    pixels[:, :, 16, 20] = 1
    trail = corrupt(pixels, "motion_blur", 5, seeded())[:, 0]
    assert float(trail[:, :, 21:].max()) < 1e-6
    columns = torch.arange(32)
    rows, steps = (torch.arange(32) - 16)[:, None].abs(), 20 - columns
    assert float(trail[:, rows > steps + 1].max()) < 1e-6
    up, down = float(trail[:, :16].sum()), float(trail[:, 17:].sum())
    assert 0.8 < up / down < 1.25


@pytest.mark.parametrize(("h", "w"), [(32, 32), (33, 28), (64, 64)])
@pytest.mark.parametrize("factor", [1.0, 1.01, 1.26, 2.25])
def test_zoom_is_scipys(factor, h, w):
    pixels = image(h, w)
    ch, cw = math.ceil(h / factor), math.ceil(w / factor)
    top, left = (h - ch) // 2, (w - cw) // 2
    large = ndimage.zoom(pixels[0, :, top : top + ch, left : left + cw].numpy(), (1, factor, factor), order=1)
    top, left = (large.shape[1] - h) // 2, (large.shape[2] - w) // 2
    expected = large[:, top : top + h, left : left + w]
    assert np.abs(base.zoom(pixels, factor)[0].numpy() - expected).max() < 1e-9


@pytest.mark.parametrize(("size", "severity", "factors"), [(32, 1, 7), (32, 3, 16), (224, 4, 13)])
def test_zoom_blur_is_the_mean_over_the_factors(size, severity, factors):
    pixels = image(size, size)
    step, stop = {(32, 1): (0.01, 1.06), (32, 3): (0.01, 1.16), (224, 4): (0.02, 1.26)}[size, severity]
    zooms = np.arange(1, stop, step)
    assert len(zooms) == factors
    expected = (pixels + sum(base.zoom(pixels, z) for z in zooms.tolist())) / (factors + 1)
    assert torch.allclose(corrupt(pixels, "zoom_blur", severity, seeded()), expected, atol=1e-9)
