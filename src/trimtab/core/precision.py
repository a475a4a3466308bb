"""Half precision: where it is widened before anything is exponentiated or summed."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def widened(x: Tensor) -> Tensor:
    """`x` in float32 where it is in half precision; anything else as it is."""
    return x.float() if x.dtype in HALF else x


def full_precision(x: Tensor) -> AbstractContextManager[None]:
    """A context without autocast on the device of `x`: matrix products within it are not narrowed again."""
    return torch.autocast(x.device.type, enabled=False)
