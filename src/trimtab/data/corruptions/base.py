"""What the corruptions share: the rule that picks a table's row, seeded draws, and three operations on images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from scipy.fft import next_fast_len
from torch import Tensor

Row = TypeVar("Row")


def pick(
    x: Float[Tensor, "n c h w"], severity: int, at_32: Sequence[Row], at_64: Sequence[Row], at_224: Sequence[Row]
) -> tuple[Row, float]:
    """The settings of a severity for images of this size.

    The reference generator has a table of five rows for each of three sizes: 32 (CIFAR-10-C), 64 (Tiny-ImageNet-C) and
    224 (ImageNet-C). Taken is the table of the largest of these sizes that the shorter side reaches, or the first.

    Returns:
        The row, and the factor by which lengths in pixels grow: the shorter side over the table's size, never below 1.
    """
    side = min(x.shape[-2:])
    native, table = (224, at_224) if side >= 224 else (64, at_64) if side >= 64 else (32, at_32)
    return table[severity - 1], max(1.0, side / native)


def uniform(x: Tensor, shape: Sequence[int], generator: torch.Generator, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Uniform draws in the precision and on the device of `x`; the numbers depend on the generator alone."""
    draw = torch.rand(*shape, generator=generator, device=generator.device, dtype=x.dtype)
    return draw.to(x.device) * (high - low) + low


def normal(x: Tensor, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Standard normal draws in the precision and on the device of `x`; the numbers depend on the generator alone."""
    return torch.randn(*shape, generator=generator, device=generator.device, dtype=x.dtype).to(x.device)


def smooth(x: Float[Tensor, "n c h w"], sigma: float, *, truncate: float, mirror: bool) -> Float[Tensor, "n c h w"]:
    """Gaussian blur as scipy's ``gaussian_filter``: ``mode="reflect"`` if `mirror`, else ``mode="nearest"``."""
    rows, columns = (_smoothing(size, sigma, truncate, mirror).to(x) for size in x.shape[-2:])
    return rows @ x @ columns.T


def _smoothing(size: int, sigma: float, truncate: float, mirror: bool) -> Float[Tensor, "size size"]:
    """The blur along one axis as a matrix, with what lies beyond the border folded back into the image."""
    radius = int(truncate * sigma + 0.5)
    steps = torch.arange(-radius, radius + 1)
    weight = torch.exp(-0.5 * (steps.double() / max(sigma, 1e-9)) ** 2)
    source = torch.arange(size)[:, None] + steps
    if mirror:
        source = source % (2 * size)
        source = torch.minimum(source, 2 * size - 1 - source)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    return matrix.scatter_add_(1, source.clamp(0, size - 1), (weight / weight.sum()).expand(size, -1))


def convolve(x: Float[Tensor, "*n h w"], kernel: Float[Tensor, "*m k k"]) -> Float[Tensor, "*nm a b"]:
    """The valid part of the convolution of `x` with `kernel`; by way of Fourier, several times faster on CPUs."""
    h, w = x.shape[-2:]
    size, edge = [next_fast_len(side, real=True) for side in (h, w)], kernel.shape[-1] - 1
    product = torch.fft.rfft2(x, s=size) * torch.fft.rfft2(kernel, s=size)
    return torch.fft.irfft2(product, s=size)[..., edge:h, edge:w]


def drag(
    x: Float[Tensor, "n c h w"], radius: int, sigma: float, degrees: Float[Tensor, " n"]
) -> Float[Tensor, "n c h w"]:
    """Motion blur as ImageMagick's: half a Gaussian of ``2 * radius + 1`` taps, one direction for each image."""
    steps = torch.arange(2 * radius + 1, dtype=x.dtype, device=x.device)
    weight = torch.exp(-0.5 * (steps / sigma) ** 2)
    weight = weight / weight.sum()
    weight = weight[weight > 1e-6]  # the rest is invisible in single precision
    reach = len(weight) - 1
    angle = degrees.deg2rad()[:, None]
    down, right = ((steps[: reach + 1] * part - 0.5).ceil().long() for part in (angle.sin(), angle.cos()))
    kernel = x.new_zeros(len(x), (2 * reach + 1) ** 2)
    kernel.scatter_add_(1, (reach - down) * (2 * reach + 1) + reach - right, weight.expand(len(x), -1))
    return convolve(F.pad(x, [reach] * 4, mode="replicate"), kernel.view(-1, 1, 2 * reach + 1, 2 * reach + 1))


def zoom(x: Float[Tensor, "n c h w"], factor: float) -> Float[Tensor, "n c h w"]:
    """Enlarge the middle of the images, size unchanged; as scipy's ``zoom(order=1)`` on a centred crop."""
    h, w = x.shape[-2:]
    crop = [math.ceil(side / factor) for side in (h, w)]
    top, left = (h - crop[0]) // 2, (w - crop[1]) // 2
    size = [round(side * factor) for side in crop]
    middle = x[..., top : top + crop[0], left : left + crop[1]]
    large = F.interpolate(middle, size=size, mode="bilinear", align_corners=True)
    top, left = (size[0] - h) // 2, (size[1] - w) // 2
    return large[..., top : top + h, left : left + w]
