"""Digital artefacts, against Pillow, scipy and formulas written once more."""

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from trimtab.data.corruptions import corrupt, digital


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def image(h=32, w=32, n=1, dtype=torch.float64):
    smooth = ndimage.gaussian_filter(np.random.default_rng(0).random((n, 3, h, w)), (0, 0, 1, 1))
    return torch.from_numpy((smooth - smooth.min()) / (smooth.max() - smooth.min())).to(dtype)


@pytest.mark.parametrize(("size", "severity", "kept"), [(32, 1, 0.75), (32, 5, 0.15), (64, 5, 0.05)])
def test_contrast(size, severity, kept):
    images = image(size, size, n=2)
    mean = images.numpy().mean((2, 3), keepdims=True)
    expected = (images.numpy() - mean) * kept + mean
    assert np.abs(corrupt(images, "contrast", severity, seeded()).numpy() - expected).max() < 1e-12


@pytest.mark.parametrize("size", [(32, 32), (50, 41), (64, 64), (224, 230)])
@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
def test_pixelate_is_pillows_box(size, severity):
    side = min(size)
    kept = {32: (0.95, 0.9, 0.85, 0.75, 0.65), 64: (0.9, 0.8, 0.7, 0.6, 0.5), 224: (0.6, 0.5, 0.4, 0.3, 0.25)}[
        224 if side >= 224 else 64 if side >= 64 else 32
    ][severity - 1]
    h, w = size
    values = image(h, w, dtype=torch.float32)[0, 0]
    small = Image.fromarray(values.numpy()).resize((int(w * kept), int(h * kept)), Image.Resampling.BOX)
    expected = np.array(small.resize((w, h), Image.Resampling.BOX))
    out = corrupt(values[None, None], "pixelate", severity, seeded())[0, 0].numpy()
    assert np.abs(out - expected).max() < 1e-5


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("size", "severity", "quality"), [(32, 1, 80), (32, 5, 40), (64, 5, 25), (28, 3, 58)])
def test_jpeg_compression(size, severity, quality, channels):
    images = image(size, size, n=2)[:, :channels]
    out = corrupt(images, "jpeg_compression", severity, seeded())
    for before, after in zip(images, out):
        levels = (before * 255).round().byte().permute(1, 2, 0).numpy()
        file = BytesIO()
        Image.fromarray(levels if channels == 3 else levels[..., 0]).save(file, "JPEG", quality=quality)
        expected = np.array(Image.open(file)).reshape(size, size, channels) / 255
        assert np.abs(after.permute(1, 2, 0).numpy() - expected).max() < 1e-9


def test_displace_is_scipys_map_coordinates():
    images = image(21, 30, n=2)
    field = 4 * torch.randn(2, 2, 21, 30, generator=seeded(), dtype=torch.float64)
    out = digital.displace(images, field)
    rows, columns = np.mgrid[:21, :30]
    for i in range(2):
        places = [rows + field[i, 1].numpy(), columns + field[i, 0].numpy()]
        for channel in range(3):
            expected = ndimage.map_coordinates(images[i, channel].numpy(), places, order=1, mode="reflect")
            assert np.abs(out[i, channel].numpy() - expected).max() < 1e-9


def test_affine_moves_the_corners_of_the_square():
    images = image(33, 40, n=2)
    jitter = 2.5 * torch.randn(2, 3, 2, generator=seeded(), dtype=torch.float64)
    out = digital.affine(images, jitter)
    corners = np.array([20, 16]) + 11 * np.array([[1, 1], [1, -1], [-1, -1]])
    rows, columns = np.mgrid[:33, :40]
    for i in range(2):
        # the map that takes each moved corner back to where it was, by least squares on [x, y, 1]
        moved = np.column_stack([corners + jitter[i].numpy(), np.ones(3)])
        back = np.linalg.lstsq(moved, corners.astype(float), rcond=None)[0]
        x, y = np.moveaxis(np.stack([columns, rows, np.ones_like(rows)], -1) @ back, -1, 0)
        for channel in range(3):
            expected = ndimage.map_coordinates(images[i, channel].numpy(), [y, x], order=1, mode="mirror")
            assert np.abs(out[i, channel].numpy() - expected).max() < 1e-9


def test_elastic_transform_from_the_same_draws():
    """Severity 3 at 32 pixels: the affine map, then uniform noise smoothed over 0.06 of the side and scaled by 0.08."""
    images = image(32, 32, n=2)
    generator = seeded(4)
    jitter = (torch.rand(2, 3, 2, generator=generator, dtype=torch.float64) * 2 - 1) * 0.06 * 32
    noise = torch.rand(2, 2, 32, 32, generator=generator, dtype=torch.float64) * 2 - 1
    smooth = ndimage.gaussian_filter(noise.numpy(), (0, 0, 0.06 * 32, 0.06 * 32), mode="reflect", truncate=3)
    expected = digital.displace(digital.affine(images, jitter), torch.from_numpy(0.08 * 32 * smooth))
    assert torch.allclose(corrupt(images, "elastic_transform", 3, seeded(4)), expected.clamp(0, 1), atol=1e-9)
