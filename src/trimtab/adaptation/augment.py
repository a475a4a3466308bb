"""The random augmentation of CoTTA and RoTTA, in plain torch: colour jitter, affine map, blur, flip and noise.

The same distribution as the authors' torchvision pipeline (clip; brightness, contrast, saturation, hue and gamma in
random order; pad; affine; blur; crop; flip; noise; clip), drawn from a generator. Padding by edge values, turning and
cropping is one bilinear look-up with clamped coordinates, as the crop never meets the end of the padding; that saves
the padded canvas, four times the image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from trimtab.core import checks
from trimtab.core.checks import InputError

_GRAY = (0.2989, 0.587, 0.114)
_BLUR_RADIUS = 2


def strong_augment(
    images: Float[Tensor, "n c h w"], generator: torch.Generator, *, flip: bool = True, per_image: bool = False
) -> Float[Tensor, "n c h w"]:
    """One random view of every image.

    Args:
        images: (n, c, h, w) in 0..1 (noise may stray outside by up to 0.5, and is clipped), c = 1 or 3. A model that
            wants normalised images normalises inside.
        generator: a CPU generator, from which everything random is drawn.
        flip: mirror half of the views; False, as ``partial(strong_augment, flip=False)``, for digits, letters and all
            else that a mirror makes another thing of.
        per_image: draw the parameters of the views for each image; by default, as in the authors' code, once for the
            whole batch. The order of the colour changes is drawn once either way, the noise for each pixel.

    Raises:
        InputError: the shape or the range is wrong.

    Example:
        >>> images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> view = strong_augment(images, torch.Generator().manual_seed(1))
        >>> view.shape, bool(((view >= 0) & (view <= 1)).all())
        (torch.Size([2, 3, 8, 8]), True)
    """
    check_images(images)
    count = len(images) if per_image else 1

    def uniform(low: float, high: float) -> Tensor:
        draw = torch.rand(count, 1, 1, 1, generator=generator, dtype=torch.float64)
        return (low + (high - low) * draw).to(images)

    x = _jitter(images.clamp(0, 1), uniform, generator)
    x = _affine(x, angle=uniform(-15, 15), shift=(uniform(-1, 1), uniform(-1, 1)), scale=uniform(0.9, 1.1))
    x = _blur(x, uniform(0.001, 0.5))
    x = torch.where(uniform(0, 1) < (0.5 if flip else 0.0), x.flip(-1), x)
    noise = torch.randn(x.shape, generator=generator).to(x)
    return (x + 0.005 * noise).clamp(0, 1)


def check_first(augment: Callable[..., Any], images: Any) -> None:
    """Refuse at once what `strong_augment`, if that is what `augment` is, would refuse where it is first needed."""
    if getattr(augment, "func", augment) is strong_augment:
        check_images(images)


def check_images(images: Any) -> None:
    """Refuse what `strong_augment` cannot serve."""
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] not in (1, 3):
        shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise InputError(
            f"images must have shape (n, 1 or 3, h, w) to be augmented, got {shape}; pass your own augment"
        )
    if not images.is_floating_point():
        raise InputError(f"images must be floating point in 0..1, got {images.dtype}")
    low, high = (float(end) for end in checks.finite(images, "images").aminmax())
    if low < -0.5 or high > 1.5:
        raise InputError(
            f"images must lie in 0..1 to be augmented, they reach from {low:.3g} to {high:.3g}: "
            "normalise inside the model, or pass your own augment"
        )


def _jitter(x: Tensor, uniform: Callable[[float, float], Tensor], generator: torch.Generator) -> Tensor:
    for step in torch.randperm(5, generator=generator).tolist():
        if step == 0:
            x = (uniform(0.6, 1.4) * x).clamp(0, 1)
        elif step == 1:
            factor = uniform(0.7, 1.3)
            x = (factor * x + (1 - factor) * _gray(x).mean((1, 2, 3), keepdim=True)).clamp(0, 1)
        elif step == 2:
            factor = uniform(0.5, 1.5)
            x = (factor * x + (1 - factor) * _gray(x)).clamp(0, 1)
        elif step == 3:
            x = _turn_hue(x, uniform(-0.06, 0.06))
        else:
            x = x.clamp(1e-8, 1) ** uniform(0.7, 1.3)
    return x


def _gray(x: Tensor) -> Tensor:
    if x.shape[1] == 1:
        return x
    return _GRAY[0] * x[:, :1] + _GRAY[1] * x[:, 1:2] + _GRAY[2] * x[:, 2:]


def _turn_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Shift the hue by a share of the full circle, by way of hue, saturation and value."""
    if x.shape[1] == 1:
        return x
    value, top = x.max(1, keepdim=True)
    chroma = value - x.amin(1, keepdim=True)
    # hue in sixths of the circle: which channel is largest, and how the two others differ
    others = (x.roll(-1, 1) - x.roll(-2, 1)).gather(1, top) / chroma.where(chroma > 0, 1)
    hue = 2 * top + others + 6 * turns
    corner = torch.tensor([5.0, 3.0, 1.0], dtype=x.dtype, device=x.device).view(1, 3, 1, 1)
    k = (corner + hue) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def _affine(x: Tensor, *, angle: Tensor, shift: tuple[Tensor, Tensor], scale: Tensor) -> Tensor:
    """Turn by degrees, scale, and shift by whole pixels, up to a sixteenth of the padded image; with the blur's margin.

    Looks every output pixel up in the image, coordinates clamped to it.
    """
    h, w = x.shape[-2:]
    radians = angle * (math.pi / 180)
    down, right = (((size + 2 * (size // 2)) / 16 * part).round() for size, part in zip((h, w), shift))
    rows = torch.arange(-_BLUR_RADIUS, h + _BLUR_RADIUS, device=x.device, dtype=x.dtype).view(1, 1, -1, 1)
    columns = torch.arange(-_BLUR_RADIUS, w + _BLUR_RADIUS, device=x.device, dtype=x.dtype).view(1, 1, 1, -1)
    v = rows - (h - 1) / 2 - down
    u = columns - (w - 1) / 2 - right
    source_u = (radians.cos() * u + radians.sin() * v) / scale
    source_v = (-radians.sin() * u + radians.cos() * v) / scale
    grid = torch.stack((source_u[:, 0] * (2 / w), source_v[:, 0] * (2 / h)), -1).expand(len(x), -1, -1, -1)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur by five taps along each side; takes the margin off."""
    taps = [(-0.5 * (offset / sigma) ** 2).exp() for offset in range(-_BLUR_RADIUS, _BLUR_RADIUS + 1)]
    total = reduce(torch.add, taps)
    for axis in (-2, -1):
        size = x.shape[axis] - 2 * _BLUR_RADIUS
        x = reduce(torch.add, (x.narrow(axis, start, size) * (tap / total) for start, tap in enumerate(taps)))
    return x
