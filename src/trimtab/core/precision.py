"""Precision: half is widened before anything is exponentiated or summed; sums that cancel are taken in double."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def widened(x: Tensor) -> Tensor:
    """`x` in float32 where it is in half precision; anything else as it is."""
    return x.float() if x.dtype in HALF else x


def exact(device: torch.device) -> torch.dtype:
    """float64, or float32 on Apple's GPUs, which have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def doubled(x: Tensor) -> Tensor:
    """`x` in the most exact precision that its device has: float64, or float32 on Apple's GPUs."""
    return x.to(exact(x.device))


def full_precision(x: Tensor) -> AbstractContextManager[None]:
    """A context without autocast on the device of `x`: matrix products within it are not narrowed again."""
    return torch.autocast(x.device.type, enabled=False)
