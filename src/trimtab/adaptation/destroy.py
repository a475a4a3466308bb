"""Images whose objects are destroyed while colours stay: patches or pixels shuffled, or the middle hidden.

`permute_patches` and `permute_pixels` follow a given order, `shuffle_patches` and `shuffle_pixels` draw one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.core import checks
from trimtab.core.checks import InputError


def shuffle_patches(
    images: Float[Tensor, "n c h w"], generator: torch.Generator, *, per_side: int = 4
) -> Float[Tensor, "n c h w"]:
    """Cut each image into per_side x per_side patches, and put them together in an order of its own.

    Args:
        images: sides of at least `per_side`; sides that it does not divide are resized (bilinearly, without
            antialiasing) to the next smaller ones that it does, and back.
        generator: a CPU generator.
        per_side: at least 2; 4 is the `patch_len` of DeYO's authors.

    Raises:
        InputError: the shape, or `per_side`, does not fit.

    Example:
        >>> image = torch.arange(16.0).view(1, 1, 4, 4)
        >>> shuffle_patches(image, torch.Generator().manual_seed(1), per_side=2)[0, 0].int().tolist()
        [[0, 1, 10, 11], [4, 5, 14, 15], [2, 3, 8, 9], [6, 7, 12, 13]]
    """
    check_images(images)
    per_side = checks.integer(per_side, "per_side", low=2)
    order = torch.rand(len(images), per_side**2, generator=generator, dtype=torch.float64).argsort(1)
    return permute_patches(images, order)


def shuffle_pixels(images: Float[Tensor, "n c h w"], generator: torch.Generator) -> Float[Tensor, "n c h w"]:
    """Put the pixels of all images in one random order.

    Raises:
        InputError: the shape is not that of images.
    """
    check_images(images)
    return permute_pixels(images, torch.randperm(images.shape[2] * images.shape[3], generator=generator))


def occlude(
    images: Float[Tensor, "n c h w"],
    generator: torch.Generator | None = None,
    *,
    window: tuple[int, int, int] | None = None,
) -> Float[Tensor, "n c h w"]:
    """Fill a square window of each image with the image's mean colour.

    Args:
        images: to be hidden in part.
        generator: not needed: nothing is random here.
        window: its top row, its left column and its side, in pixels; None is the middle half of the image, which is
            the (56, 56, 112) of DeYO's authors at 224 x 224 pixels.

    Raises:
        InputError: the shape is not that of images, or the window reaches outside.

    Example:
        >>> occlude(torch.arange(16.0).view(1, 1, 4, 4))[0, 0, 1].tolist()
        [4.0, 7.5, 7.5, 7.0]
    """
    check_images(images)
    h, w = images.shape[2:]
    if window is None:
        top, left, bottom, right = h // 4, w // 4, h // 4 + (h + 1) // 2, w // 4 + (w + 1) // 2
    else:
        top, left = window[0], window[1]
        bottom, right = top + window[2], left + window[2]
        if not (0 <= top < bottom <= h and 0 <= left < right <= w):
            raise InputError(f"window must lie inside the images of {h} x {w} pixels, got (top, left, side) = {window}")
    hidden = images.clone()
    hidden[:, :, top:bottom, left:right] = images.mean((2, 3), keepdim=True)
    return hidden


def permute_patches(images: Float[Tensor, "n c h w"], order: Int[Tensor, "n p"]) -> Float[Tensor, "n c h w"]:
    """Each image's patches, row by row, taken in its `order`: p = per_side^2 patches, order[i, j] goes to place j."""
    n, c, h, w = images.shape
    side = round(order.shape[1] ** 0.5)
    if min(h, w) < side:
        raise InputError(f"images must have sides of at least {side} pixels, one a patch, got {h} x {w}")
    even = (h // side * side, w // side * side)
    resized = images if even == (h, w) else F.interpolate(images, even, mode="bilinear")
    patches = resized.unfold(2, even[0] // side, even[0] // side).unfold(3, even[1] // side, even[1] // side)
    moved = patches.flatten(2, 3).movedim(2, 1)[torch.arange(n)[:, None], order]  # (n, p, c, rows, columns)
    whole = moved.unflatten(1, (side, side)).permute(0, 3, 1, 4, 2, 5).reshape(n, c, *even)
    return whole if even == (h, w) else F.interpolate(whole, (h, w), mode="bilinear")


def permute_pixels(images: Float[Tensor, "n c h w"], order: Int[Tensor, " hw"]) -> Float[Tensor, "n c h w"]:
    """The pixels of all images, row by row, taken in one `order`."""
    return images.flatten(2)[:, :, order].view_as(images)


def check_images(images: object) -> None:
    """Refuse what is no batch of images."""
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
        got = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise InputError(f"x must be images, floating point of shape (n, c, h, w), got {got}")
