import colorsys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage
from toynet import stream

from trimtab.adaptation.augment import _affine, _blur, _turn_hue, strong_augment
from trimtab.core.checks import InputError


def column(*values):
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1, 1)


@given(
    st.integers(4, 17),
    st.integers(4, 17),
    st.floats(-15, 15),
    st.floats(-1, 1),
    st.floats(-1, 1),
    st.floats(0.9, 1.1),
)
def test_looking_up_is_padding_turning_and_cropping(h, w, angle, down, right, scale):
    """Against the authors' order of work: pad by edge values, map the whole canvas, crop."""
    x = stream(batches=1, n=1, shape=(1, h, w)).double()[0]
    ours = _affine(x, angle=column(angle), shift=(column(down), column(right)), scale=column(scale))[0, 0, 2:-2, 2:-2]
    pad = [(h // 2 + 4,) * 2, (w // 2 + 4,) * 2]  # a little more than the authors', whose fill is never seen
    canvas = np.pad(x[0, 0].numpy(), pad, mode="edge")
    shift = np.round([(h + 2 * (h // 2)) / 16 * down, (w + 2 * (w // 2)) / 16 * right])
    t = np.deg2rad(angle)
    matrix = np.array([[np.cos(t), -np.sin(t)], [np.sin(t), np.cos(t)]]) / scale
    center = (np.array(canvas.shape) - 1) / 2
    whole = ndimage.affine_transform(canvas, matrix, center - matrix @ (center + shift), order=1, mode="constant")
    cropped = whole[pad[0][0] : pad[0][0] + h, pad[1][0] : pad[1][0] + w]
    np.testing.assert_allclose(ours.numpy(), cropped, atol=1e-9)


@given(st.lists(st.floats(0, 1), min_size=3, max_size=3), st.floats(-0.5, 0.5))
def test_hue_as_in_the_standard_library(rgb, turns):
    ours = _turn_hue(torch.tensor(rgb, dtype=torch.float64).view(1, 3, 1, 1), column(turns)).flatten()
    h, s, v = colorsys.rgb_to_hsv(*rgb)
    np.testing.assert_allclose(ours.numpy(), colorsys.hsv_to_rgb((h + turns) % 1.0, s, v), atol=1e-9)


def test_blur_is_a_gaussian_of_five_taps():
    x = stream(batches=1, n=2, shape=(3, 9, 10)).double()[0]
    ours = _blur(x, column(0.4, 0.5))
    assert ours.shape == (2, 3, 5, 6)
    for image, blurred, sigma in zip(x, ours, (0.4, 0.5)):
        taps = np.exp(-0.5 * (np.arange(-2, 3) / sigma) ** 2)
        taps /= taps.sum()
        expected = ndimage.convolve(image.numpy(), (taps[:, None] * taps)[None])[:, 2:-2, 2:-2]
        np.testing.assert_allclose(blurred.numpy(), expected, atol=1e-12)
    torch.testing.assert_close(_blur(x, column(0.001)), x[:, :, 2:-2, 2:-2])


@given(st.integers(0, 10**6), st.sampled_from([1, 3]), st.booleans(), st.sampled_from([torch.float32, torch.float64]))
def test_views_stay_images(seed, channels, per_image, dtype):
    images = stream(batches=1, n=3, shape=(channels, 9, 12)).to(dtype)[0]
    before = images.clone()
    views = [strong_augment(images, torch.Generator().manual_seed(seed), per_image=per_image) for _ in range(2)]
    assert torch.equal(views[0], views[1])
    assert views[0].shape == images.shape
    assert views[0].dtype == dtype
    assert float(views[0].min()) >= 0
    assert float(views[0].max()) <= 1
    assert torch.equal(images, before)


def test_one_draw_a_batch_or_one_an_image():
    images = stream(batches=1, n=1)[0].expand(2, -1, -1, -1)
    for seed in range(5):
        alike = strong_augment(images, torch.Generator().manual_seed(seed))
        apart = strong_augment(images, torch.Generator().manual_seed(seed), per_image=True)
        assert float((alike[0] - alike[1]).abs().max()) < 0.06, "only the noise differs"
        assert float((apart[0] - apart[1]).abs().max()) > 0.06


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 3, 8), r"got \(2, 3, 8\)"),
        (torch.zeros(2, 4, 8, 8), r"got \(2, 4, 8, 8\)"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "floating point"),
        (torch.full((2, 3, 8, 8), 255.0), "normalise inside the model"),
        (torch.full((2, 3, 8, 8), float("nan")), "finite"),
        ({"x": torch.zeros(2, 3, 8, 8)}, "got dict"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(images, message):
    with pytest.raises(InputError, match=message):
        strong_augment(images, torch.Generator())


def test_mirrored_half_of_the_time_or_never():
    images = torch.zeros(200, 1, 8, 8)
    images[..., :3] = 1
    for flip, low, high in ((True, 60, 140), (False, 0, 0)):
        views = strong_augment(images, torch.Generator().manual_seed(0), flip=flip, per_image=True)
        mirrored = views[..., 4:].sum((1, 2, 3)) > views[..., :4].sum((1, 2, 3))
        assert low <= int(mirrored.sum()) <= high
