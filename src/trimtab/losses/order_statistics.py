"""Order statistics of values that are never all held: a radix selection, sixteen bits a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor

_BITS = 16
_WORD = {torch.float32: torch.int32, torch.float64: torch.int64}


@torch.no_grad()
def ranked(
    parts: Callable[[], Iterable[Float[Tensor, "..."]]], ranks: Int[Tensor, " k"], dtype: torch.dtype
) -> Float[Tensor, " k"]:
    """Of the values in all parts, those at these places in ascending order.

    Args:
        parts: gives the parts, the same at every call: two in single precision, four in double. Any shapes, without
            NaN; infinities count.
        ranks: (k,) places, counted from 0.
        dtype: of the values: float32 or float64.
    """
    word = _WORD[dtype]
    found, mask, left = torch.zeros_like(ranks, dtype=word), 0, ranks[:, None]
    for shift in range(torch.iinfo(word).bits - _BITS, -1, -_BITS):
        counts = ranks.new_zeros(len(ranks), 1 << _BITS)
        for part in parts():
            keys = _ordered(part.flatten().view(word))
            digits = ((keys >> shift) & ((1 << _BITS) - 1)).long()
            for count, higher in zip(counts, found):
                count.scatter_add_(0, digits, ((keys ^ higher) & mask == 0).to(count.dtype))
        upto = counts.cumsum(1)
        digit = (upto <= left).sum(1, keepdim=True)
        left = left - (upto - counts).gather(1, digit)
        found = found | digit[:, 0].to(word) << shift
        mask = -1 << shift
    return _floating(found).view(dtype)


def _ordered(words: Tensor) -> Tensor:
    """The bits of floating-point numbers as those of integers without sign, in the same order."""
    info = torch.iinfo(words.dtype)
    return words ^ ((words >> info.bits - 1) | info.min)


def _floating(words: Tensor) -> Tensor:
    """`_ordered` undone."""
    info = torch.iinfo(words.dtype)
    return words ^ ((~words >> info.bits - 1) | info.min)
