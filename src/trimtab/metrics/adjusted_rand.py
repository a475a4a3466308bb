"""Adjusted Rand index: how far two ways of cutting an image into segments agree, whatever the segments are called.

1 for the same cut, 0 on average for a cut drawn at random, below 0 for worse than that. Reach for it where segments
have no fixed names or order: instances, slots, clusters.

Hubert, Arabie 1985, "Comparing partitions". Pixels without a true segment are left out, and so is the background on
request (the foreground ARI of the papers on slots), as in the code that those papers share. That code needs more pixels
than segments; here, as in scikit-learn, two cuts that are both the whole or both single pixels agree: 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.core import checks
from trimtab.core.checks import InputError
from trimtab.metrics.sums import MeanMetric

Segments = Int[Tensor, "n *where"] | Int[np.ndarray, "n *where"]


def adjusted_rand_index(predicted: Segments, truth: Segments, *, background: int | None = None) -> Float[Tensor, " n"]:
    """The adjusted Rand index of every image.

    Args:
        predicted: segment of every pixel (n, ...): any integers, ``masks.argmax(1)`` for instance.
        truth: true segment of every pixel, of the same shape; negative where there is none, and the pixel is left out.
        background: a true segment to leave out; None keeps all.

    Returns:
        For each image the index, float64; NaN where no pixel counts.

    Raises:
        InputError: a segment is no integer, or the shapes differ.

    Example:
        >>> import torch
        >>> truth = torch.tensor([[0, 0, 1, 1], [0, 0, 1, -1]])
        >>> adjusted_rand_index(torch.tensor([[7, 7, 3, 3], [0, 1, 1, 1]]), truth)
        tensor([ 1.0000, -0.5000], dtype=torch.float64)

    Reference:
        Hubert, Arabie, Journal of Classification 1985.
    """
    ours, theirs = (_segments(x, name) for x, name in ((predicted, "predicted"), (truth, "truth")))
    if ours.shape != theirs.shape:
        raise InputError(f"truth must have the shape of predicted, {tuple(ours.shape)}, got {tuple(theirs.shape)}")
    theirs = theirs.to(ours.device)
    counted = (theirs >= 0) if background is None else (theirs >= 0) & (theirs != background)
    image = torch.arange(len(ours), device=ours.device)[:, None].expand_as(ours)[counted]
    a, b = (x[counted].unique(return_inverse=True)[1] for x in (ours, theirs))
    together, own, true = (_pairs(image, cell, len(ours)) for cell in (a * len(b) + b, a, b))
    pixels = counted.sum(1).double()
    expected = own * true / (pixels * (pixels - 1))
    trivial = (own == true) & ((own == 0) | (own == pixels * (pixels - 1)))
    index = (together - expected) / ((own + true) / 2 - expected)
    return index.masked_fill(trivial, 1.0).masked_fill(pixels == 0, torch.nan)


class AdjustedRandIndex(MeanMetric):
    """`adjusted_rand_index`, the mean over all images that have one.

    Args:
        background: a true segment to leave out; None keeps all.

    Example:
        >>> import torch
        >>> metric = AdjustedRandIndex()
        >>> metric.update(torch.tensor([[7, 7, 3, 3]]), torch.tensor([[0, 0, 1, 1]]))
        >>> metric.compute()
        tensor(1., dtype=torch.float64)
    """

    higher_is_better = True

    def __init__(self, *, background: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.background = background

    def update(self, predicted: Segments, truth: Segments) -> None:
        """Add a batch: predicted and true segments of n images (n, ...)."""
        index = adjusted_rand_index(predicted, truth, background=self.background)
        self._add(index[index.isfinite()])


def _segments(value: Any, name: str) -> Int[Tensor, "n pixels"]:
    x = checks.tensor(value, name)
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise InputError(f"{name} must be integers, one a pixel, got {str(x.dtype).removeprefix('torch.')}")
    if x.ndim < 2 or x.numel() == 0:
        raise InputError(f"{name} must have shape (n, ...), n >= 1, got {tuple(x.shape)}")
    return x.long().flatten(1)


def _pairs(image: Int[Tensor, " k"], cell: Int[Tensor, " k"], images: int) -> Float[Tensor, " images"]:
    """For each image the number of ordered pairs of its pixels that lie in the same cell; cells count from 0."""
    cells = int(cell.max()) + 1 if len(cell) else 1
    found, count = (image * cells + cell).unique(return_counts=True)
    pairs = (count * (count - 1)).double()
    return pairs.new_zeros(images).index_add_(0, found // cells, pairs)
