"""A memory of a network's outputs on its training samples, some epochs back; in RAM or in a mapped file."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from trimtab.core import checks
from trimtab.core.checks import InputError
from trimtab.losses.base import same_meta


class OutputMemory(nn.Module):
    """The logits of every training sample in each of the last `lookback` + 1 epochs.

    A row is kept less its largest entry, which softmax does not see: half precision then loses nothing near the top.
    Every row remembers the epoch that it was written in, so one that was not written `lookback` epochs ago (a partial
    batch that was dropped, a sampler with replacement, a resumed run) is known as missing and teaches nothing.

    Args:
        samples: size of the training set, n.
        classes: logits of a sample, c.
        lookback: how far back `read` looks, in epochs.
        dtype: precision of the memory; it takes n (lookback + 1) (c b + 8) bytes, with b bytes a number.
        path: a file to map into memory, made where there is none and gone on with where there is; processes on one
            machine may share it. None keeps the memory in buffers, which move with the module.
        persistent: whether the buffers are part of ``state_dict()``; a file never is.

    Raises:
        InputError: a number is out of range, the precision is no floating one, or the file has another size.

    Example:
        >>> memory = OutputMemory(4, 2, lookback=1)
        >>> memory.write(torch.tensor([2, 0]), torch.tensor([[3.0, 1.0], [0.0, 0.0]]), epoch=0)
        >>> memory.read(torch.tensor([1, 2]), epoch=1)
        (tensor([[ 0.,  0.],
                [ 0., -2.]]), tensor([False,  True]))
    """

    outputs: Tensor
    written: Tensor

    def __init__(
        self,
        samples: int,
        classes: int,
        *,
        lookback: int,
        dtype: torch.dtype = torch.float32,
        path: str | Path | None = None,
        persistent: bool = True,
    ):
        super().__init__()
        self.samples = checks.integer(samples, "samples", low=1)
        self.lookback = checks.integer(lookback, "lookback", low=1)
        if not dtype.is_floating_point:
            raise InputError(f"dtype must be a floating-point type, got {dtype}")
        shape = (self.lookback + 1, self.samples, checks.integer(classes, "classes", low=2))
        if path is None:
            self.register_buffer("outputs", torch.zeros(shape, dtype=dtype), persistent=persistent)
            self.register_buffer("written", torch.zeros(shape[:2], dtype=torch.int64), persistent=persistent)
        else:
            self.written, self.outputs = _mapped(Path(path), shape, dtype)

    def write(self, index: Int[Tensor, " b"], logits: Float[Tensor, "b c"], epoch: int) -> None:
        """Remember the logits of the samples `index` in this epoch (of one sample's several rows, one)."""
        same_meta(logits=logits, index=index, memory=self.outputs)
        slot, index = epoch % (self.lookback + 1), index.to(self.written.device)
        rows = logits.detach()
        rows = (rows - rows.amax(1, keepdim=True)).clamp_(min=torch.finfo(self.outputs.dtype).min)
        self.outputs[slot, index] = rows.to(self.outputs)
        self.written[slot, index] = epoch + 1  # zero, which a new file is full of, is never

    def read(self, index: Int[Tensor, " b"], epoch: int) -> tuple[Float[Tensor, "b c"], Bool[Tensor, " b"]]:
        """The logits of the samples `index`, `lookback` epochs before this one, and which of them are there."""
        then, index = epoch - self.lookback, index.to(self.written.device)
        slot = then % (self.lookback + 1)
        return self.outputs[slot, index], self.written[slot, index] == then + 1


def _mapped(path: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Epochs (slots, n) and outputs (slots, n, c), both views of the file at `path`."""
    slots, n, c = shape
    head = 8 * slots * n
    size = head + slots * n * c * dtype.itemsize
    if path.exists() and path.stat().st_size != size:
        raise InputError(f"path must be a new file or a memory of {size} bytes, {path} has {path.stat().st_size}")
    if not path.parent.is_dir():
        raise InputError(f"path must lie in a folder that is there, {path.parent} is none")
    content = torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
    return content[:head].view(torch.int64).view(slots, n), content[head:].view(dtype).view(shape)
