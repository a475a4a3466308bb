"""PASTA: slug 01-augcal."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.core.checks import InputError
from trimtab.losses import PASTA

GOLDEN = Path(__file__).parents[1] / "golden" / "01-augcal"


def some(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(shape, generator=generator, dtype=dtype)
    return torch.rand(shape, generator=generator, dtype=dtype), noise


@pytest.mark.golden
@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.npz")), ids=lambda path: path.stem)
def test_the_authors_numbers(path):
    with np.load(path) as arrays:
        cases = sorted({name.split("/")[0] for name in arrays.files if name.endswith("/sigma")})
        if not cases:
            pytest.skip(f"{path.name} is not of this transform")
        for case in cases:
            get = {
                name.split("/")[1]: torch.from_numpy(np.asarray(arrays[name])) for name in arrays.files if case in name
            }
            pasta = PASTA(**{name: get[name].item() for name in ("alpha", "beta", "k")})
            np.testing.assert_allclose(pasta.strength(*get["sigma"].shape), get["sigma"], atol=1e-12, err_msg=case)
            np.testing.assert_allclose(pasta(get["img"], get["eps"]), get["out"], atol=5e-6, err_msg=case)


def test_some_golden_case_is_of_this_transform():
    assert any(name.endswith("/sigma") for path in GOLDEN.glob("*.npz") for name in np.load(path).files)


@given(h=st.integers(3, 9), w=st.integers(3, 9), c=st.integers(1, 4), seed=st.integers(0, 1000))
def test_it_is_the_real_part_of_the_whole_spectrum(h, w, c, seed):
    images, noise = some(2, c, h, w, seed=seed)
    pasta = PASTA()
    spectrum = torch.fft.fft2(images) * (1 + pasta.strength(h, w) * noise)
    torch.testing.assert_close(pasta(images, noise), torch.fft.ifft2(spectrum).real.clamp(0, 1))


def test_without_strength_the_image_stays():
    images, noise = some(2, 3, 6, 7)
    torch.testing.assert_close(PASTA(alpha=0, beta=0)(images, noise), images)


def test_images_differ_and_a_batch_is_its_images():
    images, noise = some(2, 3, 8, 8)
    pasta = PASTA()
    torch.testing.assert_close(pasta(images, noise)[1], pasta(images[1], noise[1]))
    same = pasta(images[:1].expand(2, 3, 8, 8))
    assert not torch.equal(same[0], same[1])


def test_its_state_continues():
    images, _ = some(3, 8, 8)
    pasta, other = PASTA(generator=torch.Generator().manual_seed(5)), PASTA()
    pasta(images)
    other.load_state_dict(pasta.state_dict())
    assert torch.equal(pasta(images), other(images))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_precision_stays(dtype):
    images, noise = some(3, 8, 8)
    varied = PASTA()(images.to(dtype), noise.to(dtype))
    assert varied.dtype == dtype
    torch.testing.assert_close(varied.double(), PASTA()(images, noise), atol=0.05, rtol=0)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 8, 8, dtype=torch.uint8), "images must be floating point in 0..1, got uint8"),
        (torch.full((3, 8, 8), 2.0), "images must lie in 0..1, before any normalisation, got 2 to 2"),
        (torch.full((3, 8, 8), torch.nan), "images must be finite"),
        (torch.zeros(8, 8), r"images must have shape \(c, h, w\) or"),
        (torch.zeros(0, 3, 8, 8), "n >= 1"),
        (torch.zeros(3, 2, 2), "h and w >= 3"),
    ],
)
def test_bad_images_are_refused(images, message):
    with pytest.raises(InputError, match=message):
        PASTA()(images)


@pytest.mark.bad_input
def test_other_bad_input_is_refused():
    with pytest.raises(InputError, match=r"noise must have the shape of images, \(3, 8, 8\), got \(8, 8\)"):
        PASTA()(torch.zeros(3, 8, 8), torch.zeros(8, 8))
    with pytest.raises(InputError, match="noise must be on the device of images"):
        PASTA()(torch.zeros(3, 8, 8), torch.zeros(3, 8, 8, device="meta"))
    for settings in ({"alpha": -1}, {"beta": -1}, {"k": 0}):
        with pytest.raises(InputError, match=f"{next(iter(settings))} must lie in"):
            PASTA(**settings)
