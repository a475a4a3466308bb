"""MS-SSIM as a loss and as a metric: slug 53-ms-ssim."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from trimtab.core.checks import InputError
from trimtab.losses import MSSSIM, ExpectedLossVAE
from trimtab.metrics import MultiScaleSSIM, ms_ssim, ssim

GOLDEN = Path(__file__).parents[1] / "golden" / "53-ms-ssim"


@pytest.mark.golden
@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.npz")), ids=lambda path: path.stem)
def test_the_public_codes_numbers(path):
    arrays = dict(np.load(path))
    cases = sorted({name.split("/")[0] for name in arrays if name.endswith("/ms_ssim")})
    assert cases
    for case in cases:
        given_ = {name.split("/")[1]: value for name, value in arrays.items() if name.startswith(f"{case}/")}
        expected = torch.from_numpy(given_["ms_ssim"])
        rtol, slope = (1e-8, 1e-5) if expected.dtype == torch.float64 else (1e-4, 1e-4)
        x, y = (torch.from_numpy(given_[name]).to(expected.dtype) for name in "XY")
        window = {
            "data_range": float(given_["data_range"]),
            "win_size": int(given_["win_size"]),
            "sigma": float(given_["win_sigma"]),
        }
        scales = given_["weights"].tolist()
        torch.testing.assert_close(ms_ssim(x, y, scales=scales, **window), expected, rtol=rtol, atol=0)
        torch.testing.assert_close(ssim(x, y, **window), torch.from_numpy(given_["ssim"]), rtol=rtol, atol=0)
        y.requires_grad_(True)
        value = MSSSIM(scales=scales, **window)(y, x)
        torch.testing.assert_close(value.detach(), 1 - expected.mean(), rtol=rtol, atol=rtol)
        value.backward()
        wanted = -torch.from_numpy(given_["grad_Y_of_mean"]).to(y.dtype)
        torch.testing.assert_close(y.grad, wanted, rtol=slope, atol=slope * float(wanted.abs().max()))


def pictures(seed, *shape):
    images, other = torch.rand(2, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return images, 0.6 * images + 0.4 * other


def by_definition(x, y, exponents, size, sigma):
    """The definition, with a square window and five maps."""
    steps = torch.arange(size, dtype=torch.float32) - size // 2
    row = torch.exp(-steps.square() / (2 * sigma**2))
    row = (row / row.sum()).double()
    window = torch.outer(row, row).expand(x.shape[1], 1, size, size)

    def blur(image):
        return F.conv2d(image, window, groups=image.shape[1])

    value = 1.0
    for scale, exponent in enumerate(exponents, 1):
        a, b = blur(x), blur(y)
        within, across = blur(x * x) - a * a + blur(y * y) - b * b, blur(x * y) - a * b
        map_ = (2 * across + 0.03**2) / (within + 0.03**2)
        if scale == len(exponents):
            map_ = map_ * (2 * a * b + 0.01**2) / (a * a + b * b + 0.01**2)
        value = value * map_.mean((2, 3)).relu() ** exponent
        odd = [side % 2 for side in x.shape[2:]]
        x, y = F.avg_pool2d(x, 2, padding=odd), F.avg_pool2d(y, 2, padding=odd)
    return value.mean(1)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 999), n=st.integers(1, 3), c=st.integers(1, 3), height=st.integers(9, 20),
    width=st.integers(9, 20), scales=st.integers(1, 3),
)  # fmt: skip
def test_values_and_both_gradients_are_those_of_the_definition(seed, n, c, height, width, scales):
    x, y = (image.requires_grad_(True) for image in pictures(seed, n, c, height, width))
    value = ms_ssim(x, y, data_range=1, scales=scales, win_size=3, sigma=0.8)
    exponents = torch.tensor([0.0448, 0.2856, 0.3001][:scales], dtype=torch.float64)
    expected = by_definition(x, y, (exponents / exponents.sum()).tolist(), 3, 0.8)
    torch.testing.assert_close(value, expected)
    found, wanted = (torch.autograd.grad(v.square().sum(), (x, y)) for v in (value, expected))
    torch.testing.assert_close(found, wanted)


@settings(max_examples=25)
@given(seed=st.integers(0, 999), factor=st.sampled_from([1.0, 255.0, 1e-3]))
def test_similarity_is_symmetric_and_at_most_one_in_any_unit(seed, factor):
    x, y = pictures(seed, 2, 2, 16, 13)
    window = {"win_size": 5, "scales": 2}
    value = ms_ssim(x, y, data_range=1, **window)
    torch.testing.assert_close(ms_ssim(y, x, data_range=1, **window), value)
    torch.testing.assert_close(ms_ssim(factor * x, factor * y, data_range=factor, **window), value)
    assert ((value > 0) & (value < 1)).all()
    torch.testing.assert_close(ms_ssim(x, x, data_range=1, **window), torch.ones_like(value))


def test_only_the_asked_gradient_is_taken():
    x, y = pictures(0, 2, 1, 12, 12)
    ssim(x, y.requires_grad_(True), data_range=1).sum().backward()
    assert x.grad is None
    assert y.grad.isfinite().all()


def test_images_of_any_memory_format_are_read_alike():
    x, y = pictures(1, 2, 3, 12, 12)
    plain = ssim(x, y, data_range=1)
    assert torch.equal(ssim(x.contiguous(memory_format=torch.channels_last), y, data_range=1), plain)
    assert torch.equal(ssim(x.transpose(2, 3).contiguous().transpose(2, 3), y, data_range=1), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opposite_and_flat_images_give_finite_numbers(dtype):
    x = pictures(2, 2, 1, 12, 12)[0].to(dtype)
    for outputs in (1 - x, torch.zeros_like(x), torch.full_like(x, 0.5), x, -1e4 * x):
        for similarity in (MSSSIM(data_range=1, scales=2, win_size=5), lambda a, b: ssim(a, b, data_range=1).mean()):
            outputs = outputs.detach().requires_grad_(True)
            value = similarity(outputs, x)
            value.backward()
            assert value.isfinite()
            assert outputs.grad.isfinite().all()
    opposite = (1 - x).requires_grad_(True)
    value = ms_ssim(opposite, x, data_range=1, scales=2, win_size=5)
    assert (value == 0).all()
    value.sum().backward()
    assert (opposite.grad == 0).all()


def test_half_precision_is_widened():
    x, y = (image.bfloat16() for image in pictures(3, 2, 1, 12, 12))
    assert ssim(x, y, data_range=1).dtype == torch.float32
    assert ssim(x, y.double(), data_range=1).dtype == torch.float64


def test_reductions():
    x, y = pictures(4, 3, 1, 12, 12)
    per_image = MSSSIM(data_range=1, scales=1, reduction="none")(x, y)
    assert per_image.shape == (3,)
    torch.testing.assert_close(MSSSIM(data_range=1, scales=1, reduction="sum")(x, y), per_image.sum())
    torch.testing.assert_close(MSSSIM(data_range=1, scales=1)(x, y), per_image.mean())


def test_the_metric_is_the_mean_over_all_images():
    x, y = pictures(5, 5, 2, 12, 12)
    first, second = (MultiScaleSSIM(data_range=1, scales=2, win_size=3) for _ in range(2))
    first.update(x[:2], y[:2])
    second.update(x[2:], y[2:])
    first.total += second.total
    first.samples += second.samples
    torch.testing.assert_close(first.compute(), ms_ssim(x, y, data_range=1, scales=2, win_size=3).mean())


def test_a_gradient_step_raises_similarity():
    x, y = pictures(6, 2, 1, 20, 20)
    loss = MSSSIM(data_range=1, scales=2, win_size=5)
    outputs = y.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([outputs], lr=0.02)
    before = loss(outputs, x).item()
    for _ in range(30):
        optimizer.zero_grad()
        loss(outputs, x).backward()
        optimizer.step()
    assert loss(outputs, x).item() < 0.3 * before


@settings(max_examples=20)
@given(seed=st.integers(0, 999), weight=st.floats(0.1, 10))
def test_the_autoencoders_divergence_is_that_of_the_distributions(seed, weight):
    x, y = pictures(seed, 4, 1, 3, 3)
    mean, log_variance = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    normal = torch.distributions.Normal
    divergence = torch.distributions.kl_divergence(normal(mean, (log_variance / 2).exp()), normal(0.0, 1.0))
    found = ExpectedLossVAE(nn.MSELoss(), weight=weight)(x, y, mean, log_variance)
    torch.testing.assert_close(found, weight * F.mse_loss(x, y) + divergence.sum(1).mean())


SETTINGS = {"data_range": 1.0}


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"data_range": 0}, r"data_range must lie in \(0"),
        ({"win_size": 4}, "win_size must be odd, got 4"),
        ({"win_size": 0}, "win_size must be at least 1"),
        ({"sigma": 0}, "sigma must lie in"),
        ({"k1": 0}, "k1 must lie in"),
        ({"scales": 6}, "scales must be at most 5"),
        ({"scales": [0.5, -0.5]}, "scales must lie in"),
        ({"scales": []}, "scales must hold a positive exponent"),
    ],
)
def test_bad_settings_are_refused_when_they_are_given(change, told):
    for build in (MSSSIM, MultiScaleSSIM, lambda **s: ms_ssim(torch.zeros(1, 1, 9, 9), torch.zeros(1, 1, 9, 9), **s)):
        with pytest.raises(InputError, match=told):
            build(**(SETTINGS | change))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("images", "targets", "told"),
    [
        (torch.zeros(1, 1, 160, 200), torch.zeros(1, 1, 160, 200), "images must be larger than 160 x 160 for 5 scales"),
        (torch.zeros(1, 1, 200, 200), torch.zeros(1, 3, 200, 200), "targets must have the shape of images"),
        (torch.zeros(1, 200, 200), torch.zeros(1, 200, 200), r"images must be floating point of shape \(n, c, h, w\)"),
        (torch.zeros(0, 1, 200, 200), torch.zeros(0, 1, 200, 200), "none of them 0"),
        (torch.zeros(1, 1, 9, 9, dtype=torch.uint8), torch.zeros(1, 1, 9, 9), "images must be floating point"),
        (torch.zeros(1, 1, 200, 200), torch.full((1, 1, 200, 200), torch.nan), "targets must be finite, found nan"),
        (torch.zeros(1, 1, 9, 9), torch.zeros(1, 1, 9, 9, device="meta"), "targets must be on the device of images"),
    ],
)
def test_bad_images_are_refused(images, targets, told):
    with pytest.raises(InputError, match=told):
        MSSSIM(data_range=1)(images, targets)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("mean", "log_variance", "told"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4), "log_variance must have 3 columns"),
        (torch.zeros(3, 3), torch.zeros(3, 3), "one row a sample, got 2, 3 and 3"),
        (torch.zeros(2, 3), torch.full((2, 3), 100.0), r"log_variance must lie in \[-inf, 80\], found 100"),
        (torch.zeros(2, 3), torch.full((2, 3), torch.nan), "log_variance must be finite"),
    ],
)
def test_bad_codes_are_refused(mean, log_variance, told):
    x = torch.zeros(2, 1, 4, 4)
    with pytest.raises(InputError, match=told):
        ExpectedLossVAE(nn.MSELoss(), weight=1)(x, x, mean, log_variance)
