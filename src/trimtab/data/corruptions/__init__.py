"""The fifteen standard corruptions at five severities: how a classifier's input degrades in the world.

Noise, blur, weather and digital artefacts, as in CIFAR-10-C, Tiny-ImageNet-C and ImageNet-C (Hendrycks & Dietterich
2019, arXiv:1903.12261), for whole batches of tensors of any size from 8 x 8 up, on any device, from a seed. Reach for
them to test a model on shifts before the world does, or as the stream that an adapter must follow.

Settings are those of the reference generator (hendrycks/robustness), which has a table for each of three sizes. Taken
is the table of the largest of 32, 64 and 224 pixels that the shorter side reaches (the first, if it reaches none);
where an image is larger than its table's size, lengths in pixels grow in proportion.

Two things differ from the reference. Values are not rounded to 256 levels, but for JPEG. Frost is drawn, because the
photographs that the reference crops cannot be shipped. Where the reference's code departs from its description, the
code is followed, because the published data sets were made with it: glass blur copies pixels where it means to swap
them, and ImageNet-C's elastic transform takes the side for 244.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.core import checks
from trimtab.core.checks import InputError
from trimtab.data.corruptions.blur import defocus_blur, glass_blur, motion_blur, zoom_blur
from trimtab.data.corruptions.digital import contrast, elastic_transform, jpeg_compression, pixelate
from trimtab.data.corruptions.noise import gaussian_noise, impulse_noise, shot_noise
from trimtab.data.corruptions.weather import brightness, fog, frost, snow

_FUNCTIONS = {
    function.__name__: function
    for function in (
        gaussian_noise,
        shot_noise,
        impulse_noise,
        defocus_blur,
        glass_blur,
        motion_blur,
        zoom_blur,
        snow,
        frost,
        fog,
        brightness,
        contrast,
        elastic_transform,
        pixelate,
        jpeg_compression,
    )
}
CORRUPTIONS = tuple(_FUNCTIONS)
__all__ = ["CORRUPTIONS", "corrupt"]


def corrupt(
    images: Float[Tensor, "n c h w"], name: str, severity: int, generator: torch.Generator
) -> Float[Tensor, "n c h w"]:
    """Corrupted copies of a batch of images.

    Args:
        images: (n, c, h, w) with n >= 1, c 1 or 3, h and w >= 8, values in 0..1.
        name: one of `CORRUPTIONS`.
        severity: 1 (slight) to 5 (strong), ordered by how hard recognition becomes. Distance need not grow with it:
            elastic_transform moves pixels less far at 5 than at 1, but more abruptly.
        generator: where random draws come from; on the CPU, or on the images' device. A CPU generator makes
            the same draws for every device.

    Returns:
        Images of the same shape, precision and device, values in 0..1. Half precision is computed in single.

    Raises:
        InputError: the images' type, shape or range, the name or the severity is wrong.

    Example:
        >>> images = torch.full((2, 3, 32, 32), 0.5)
        >>> noisy = corrupt(images, "gaussian_noise", 5, torch.Generator().manual_seed(0))
        >>> round(float(noisy.std()), 2)
        0.1

    Reference:
        Hendrycks & Dietterich, Benchmarking Neural Network Robustness to Common Corruptions and Perturbations, 2019.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = str(images.dtype).removeprefix("torch.") if isinstance(images, Tensor) else type(images).__name__
        raise InputError(f"images must be a floating-point tensor in 0..1, got {kind}")
    if images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) == 0 or min(images.shape[2:]) < 8:
        raise InputError(
            f"images must have shape (n, c, h, w) with n >= 1, c 1 or 3, h and w >= 8, got {tuple(images.shape)}"
        )
    checks.finite(images, "images")
    outside = (images < 0) | (images > 1)
    if bool(outside.any()):
        value = images[outside][0].item()
        raise InputError(f"images must lie in 0..1, found {value:.6g} at {checks.first_bad(outside)}")
    if name not in _FUNCTIONS:
        raise InputError(f"name must be one of {', '.join(CORRUPTIONS)}; got {name!r}")
    checks.integer(severity, "severity", low=1, high=5)
    x = images.detach().to(torch.promote_types(images.dtype, torch.float32))
    return _FUNCTIONS[name](x, severity, generator).clamp(0, 1).to(images.dtype)
