"""Digital: contrast, elastic transform, pixelate, JPEG compression."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from trimtab.data.corruptions.base import pick, smooth, uniform


def contrast(x: Float[Tensor, "n c h w"], severity: int, generator: torch.Generator) -> Float[Tensor, "n c h w"]:
    """Values drawn towards the mean of their image and channel."""
    strong = (0.4, 0.3, 0.2, 0.1, 0.05)
    kept, _ = pick(x, severity, (0.75, 0.5, 0.4, 0.3, 0.15), strong, strong)
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * kept + mean


def elastic_transform(
    x: Float[Tensor, "n c h w"], severity: int, generator: torch.Generator
) -> Float[Tensor, "n c h w"]:
    """A random affine map, then a smooth random displacement of every pixel; the table holds shares of the side."""
    odd = 244 / 224  # the reference multiplies by 244 at 224 pixels, and its data was made so
    (alpha, sigma, jitter), _ = pick(
        x,
        severity,
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
        ((0, 0, 0.08), (0.05, 0.3, 0.06), (0.1, 0.08, 0.06), (0.1, 0.03, 0.03), (0.16, 0.03, 0.02)),
        (
            (2 * odd, 0.7 * odd, 0.1 * odd),
            (2 * odd, 0.08 * odd, 0.2 * odd),
            (0.05 * odd, 0.01 * odd, 0.02 * odd),
            (0.07 * odd, 0.01 * odd, 0.02 * odd),
            (0.12 * odd, 0.01 * odd, 0.02 * odd),
        ),
    )
    side = min(x.shape[-2:])
    moved = affine(x, uniform(x, (len(x), 3, 2), generator, -jitter * side, jitter * side))
    noise = uniform(x, (len(x), 2, *x.shape[-2:]), generator, -1, 1)
    return displace(moved, alpha * side * smooth(noise, sigma * side, truncate=3.0, mirror=True))


def affine(x: Float[Tensor, "n c h w"], jitter: Float[Tensor, "n 3 2"]) -> Float[Tensor, "n c h w"]:
    """Move three corners of a centred square by `jitter` (x, y), and the image with them."""
    h, w = x.shape[-2:]
    s = min(h, w) // 3
    middle = torch.tensor([w // 2, h // 2], dtype=x.dtype, device=x.device)
    corners = middle + s * torch.tensor([[1, 1], [1, -1], [-1, -1]], dtype=x.dtype, device=x.device)
    back = torch.linalg.solve(F.pad(corners + jitter, (0, 1), value=1.0), corners.expand(len(x), -1, -1))
    rows, columns = torch.meshgrid(
        torch.arange(h, dtype=x.dtype, device=x.device), torch.arange(w, dtype=x.dtype, device=x.device), indexing="ij"
    )
    source = torch.stack((columns, rows, torch.ones_like(rows)), -1) @ back[:, None]
    last = torch.tensor([w - 1, h - 1], dtype=x.dtype, device=x.device)
    return F.grid_sample(x, 2 * source / last - 1, padding_mode="reflection", align_corners=True)


def displace(x: Float[Tensor, "n c h w"], field: Float[Tensor, "n 2 h w"]) -> Float[Tensor, "n c h w"]:
    """Read every pixel from a place moved by `field` (x, y), in pixels; the border mirrors."""
    h, w = x.shape[-2:]
    columns = torch.arange(w, dtype=x.dtype, device=x.device) + field[:, 0]
    rows = torch.arange(h, dtype=x.dtype, device=x.device)[:, None] + field[:, 1]
    grid = torch.stack(((2 * columns + 1) / w - 1, (2 * rows + 1) / h - 1), -1)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def pixelate(x: Float[Tensor, "n c h w"], severity: int, generator: torch.Generator) -> Float[Tensor, "n c h w"]:
    """Shrunk and enlarged again with a box filter."""
    kept, _ = pick(x, severity, (0.95, 0.9, 0.85, 0.75, 0.65), (0.9, 0.8, 0.7, 0.6, 0.5), (0.6, 0.5, 0.4, 0.3, 0.25))
    rows, columns = ((_box(int(side * kept), side) @ _box(side, int(side * kept))).to(x) for side in x.shape[-2:])
    return rows @ x @ columns.T


def _box(size: int, new: int) -> Float[Tensor, "new size"]:
    """Pillow's BOX resize along one axis as a matrix: how it answers the unit impulses."""
    impulses = Image.fromarray(np.eye(size, dtype=np.float32))
    return torch.from_numpy(np.array(impulses.resize((new, size), Image.Resampling.BOX))).T


def jpeg_compression(
    x: Float[Tensor, "n c h w"], severity: int, generator: torch.Generator
) -> Float[Tensor, "n c h w"]:
    """Written as JPEG by Pillow and read back, image by image; values are rounded to 256 levels."""
    quality, _ = pick(x, severity, (80, 65, 58, 50, 40), (65, 58, 50, 40, 25), (25, 18, 15, 10, 7))
    levels = (x * 255).round().byte().movedim(1, -1).contiguous().cpu().numpy()
    out = np.empty_like(levels)
    for image, place in zip(levels, out):
        file = BytesIO()
        Image.fromarray(image.squeeze(-1) if x.shape[1] == 1 else image).save(file, "JPEG", quality=quality)
        place[:] = np.asarray(Image.open(file)).reshape(image.shape)
    return torch.from_numpy(out).movedim(-1, 1).to(x) / 255
