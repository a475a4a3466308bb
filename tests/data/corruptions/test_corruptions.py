"""Every corruption: range, shape, seeds, severities, and bad input refused."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_image

from trimtab.core.checks import InputError
from trimtab.data.corruptions import CORRUPTIONS, corrupt
from trimtab.data.corruptions.base import pick

DETERMINISTIC = ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def photograph(size):
    """The middle of a photograph of a flower that scikit-learn bundles: (1, 3, size, size)."""
    picture = Image.fromarray(load_sample_image("flower.jpg")).crop((107, 0, 534, 427)).resize((size, size))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255


def test_the_fifteen():
    assert len(CORRUPTIONS) == len(set(CORRUPTIONS)) == 15


@settings(max_examples=120)
@given(
    st.sampled_from(CORRUPTIONS),
    st.integers(1, 5),
    st.integers(1, 3),
    st.sampled_from([1, 3]),
    st.tuples(st.integers(8, 75), st.integers(8, 75)),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.sampled_from(["random", "black", "white"]),
    st.integers(0, 99),
)
def test_range_shape_precision_and_seed(name, severity, n, c, size, dtype, content, seed):
    shape = (n, c, *size)
    images = {
        "random": torch.rand(shape, generator=seeded(seed)).to(dtype),
        "black": torch.zeros(shape, dtype=dtype),
        "white": torch.ones(shape, dtype=dtype),
    }[content]
    before = images.clone()
    out = corrupt(images, name, severity, seeded(seed))
    assert out.shape == images.shape
    assert out.dtype == dtype
    assert out.device == images.device
    assert float(out.min()) >= 0
    assert float(out.max()) <= 1
    assert torch.equal(images, before), "the caller's images were written to"
    assert torch.equal(out, corrupt(images, name, severity, seeded(seed)))


@pytest.mark.parametrize("name", [name for name in CORRUPTIONS if name not in DETERMINISTIC])
def test_another_seed_gives_another_corruption_and_images_differ(name):
    images = photograph(32).expand(2, -1, -1, -1)
    one = corrupt(images, name, 3, seeded(0))
    assert not torch.equal(one, corrupt(images, name, 3, seeded(1)))
    assert not torch.equal(one[0], one[1]), "two copies of an image were corrupted alike"


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic_corruptions_take_every_image_by_itself(name):
    images = torch.rand(3, 3, 40, 33, generator=seeded())
    generator = seeded()
    together = corrupt(images, name, 4, generator)
    alone = torch.cat([corrupt(image[None], name, 4, generator) for image in images])
    assert torch.allclose(together, alone, atol=1e-6)
    assert torch.equal(generator.get_state(), seeded().get_state()), "the generator was used"


# Not monotone, in the reference either: elastic_transform (its rows trade reach for abruptness), glass_blur (a stronger
# blur hides more of the shuffling), frost (more ice, but less of a bright image), snow (smaller or fewer flakes).
UNEVEN = ("elastic_transform", "glass_blur", "frost", "snow")


@pytest.mark.parametrize("size", [28, 64, 224])
@pytest.mark.parametrize("name", [name for name in CORRUPTIONS if name not in UNEVEN])
def test_mean_distortion_grows_with_severity(name, size):
    images = photograph(size).expand(64 if size < 100 else 8, -1, -1, -1)
    distances = [float((corrupt(images, name, s, seeded()) - images).abs().mean()) for s in range(1, 6)]
    # 2 %, because the random ones are means over few draws
    assert all(weaker < stronger * 1.02 for weaker, stronger in pairwise(distances)), distances
    assert distances[-1] > 1.2 * distances[0] > 0


@pytest.mark.parametrize("name", UNEVEN)
def test_the_uneven_ones_distort_too(name):
    images = photograph(32).expand(64, -1, -1, -1)
    for severity in range(1, 6):
        assert float((corrupt(images, name, severity, seeded()) - images).abs().mean()) > 0.02


def test_grey_images_stay_grey_in_colour():
    """Three equal channels come out equal where the corruption treats the image as one thing."""
    grey = photograph(32).mean(1, keepdim=True)
    for name in ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow", "fog", "brightness", "contrast",
                 "elastic_transform", "pixelate"):  # fmt: skip
        colour = corrupt(grey.expand(-1, 3, -1, -1), name, 3, seeded())
        assert torch.allclose(colour, corrupt(grey, name, 3, seeded()).expand_as(colour), atol=1e-5), name


def test_tables_are_picked_by_the_shorter_side():
    def picked(*size):
        return pick(torch.zeros(1, 1, *size), 2, "abcde", "fghij", "klmno")

    assert picked(8, 8) == ("b", 1.0)
    assert picked(32, 300) == ("b", 1.0)
    assert picked(48, 63) == ("b", 1.5)
    assert picked(64, 64) == ("g", 1.0)
    assert picked(223, 96) == ("g", 1.5)
    assert picked(224, 224) == ("l", 1.0)
    assert picked(448, 600) == ("l", 2.0)


@pytest.mark.parametrize("name", ["defocus_blur", "glass_blur", "motion_blur", "elastic_transform"])
def test_larger_images_are_blurred_as_much_for_their_size(name):
    """A photograph corrupted at 448 pixels and shrunk is about as far from the original as one corrupted at 224."""
    small, large = photograph(224), photograph(448)
    at_small = (corrupt(small, name, 5, seeded()) - small).square().mean()
    shrunk = torch.nn.functional.avg_pool2d(corrupt(large, name, 5, seeded()), 2)
    at_large = (shrunk - torch.nn.functional.avg_pool2d(large, 2)).square().mean()
    assert 0.7 < float(at_large / at_small) < 1.4


GOOD = torch.full((2, 3, 8, 8), 0.5)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("images", "name", "severity", "message"),
    [
        (GOOD.byte(), "fog", 1, r"images must be a floating-point tensor in 0\.\.1, got uint8"),
        (GOOD.numpy(), "fog", 1, "floating-point tensor in 0..1, got ndarray"),
        (GOOD[0], "fog", 1, r"shape \(n, c, h, w\).* got \(3, 8, 8\)"),
        (GOOD[:0], "fog", 1, r"n >= 1.* got \(0, 3, 8, 8\)"),
        (GOOD[:, :2], "fog", 1, r"c 1 or 3.* got \(2, 2, 8, 8\)"),
        (GOOD[..., :7], "fog", 1, r"h and w >= 8, got \(2, 3, 8, 7\)"),
        (
            GOOD.masked_fill(torch.arange(2)[:, None, None, None] == 1, torch.nan),
            "fog",
            1,
            "found nan at axis 0 index 1",
        ),
        (GOOD + torch.arange(2)[:, None, None, None], "fog", 1, r"lie in 0\.\.1, found 1\.5 at axis 0 index 1"),
        (GOOD - 1, "fog", 1, r"lie in 0\.\.1, found -0\.5"),
        (GOOD, "fogg", 1, "name must be one of gaussian_noise, .*, jpeg_compression; got 'fogg'"),
        (GOOD, "fog", 0, "severity must be at least 1, got 0"),
        (GOOD, "fog", 6, "severity must be at most 5, got 6"),
        (GOOD, "fog", 2.0, "severity must be an integer, got float"),
    ],
)
def test_bad_input_is_refused(images, name, severity, message):
    with pytest.raises(InputError, match=message):
        corrupt(images, name, severity, seeded())
