"""What the training objectives share: the door, precision, reduction.

A loss is an `nn.Module`; where the method allows it is called as ``loss(logits, labels)`` and returns the mean over the
batch. What needs more says so in its signature. Inputs of half precision are widened to float32 before anything is
exponentiated, so that a loss may be called within autocast. Values (NaN, labels out of range) are checked in eager mode
only: a graph that `torch.compile` traces does not wait for them.
"""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

from trimtab.core import checks
from trimtab.core.checks import InputError
from trimtab.core.precision import full_precision as full_precision
from trimtab.core.precision import widened as widened

Reduction = Literal["mean", "sum", "none"]


def pair(logits: Tensor, labels: Tensor) -> tuple[Float[Tensor, "n c"], Int[Tensor, " n"]]:
    """Checked logits, at least float32, and labels.

    Args:
        logits: (n, c), n >= 1, c >= 2, floating point, finite.
        labels: (n,), integers in 0..c-1, on the same device.

    Raises:
        InputError: a shape, a type, a device or a value is wrong.
    """
    same_device(logits=logits, labels=labels)
    logits = checks.logits(logits)
    return widened(logits), checks.labels(labels, *logits.shape)


def same_device(**tensors: Tensor) -> None:
    """Refuse tensors that are not on one device, by the names they are given."""
    (first, there), *others = ((name, checks.tensor(value, name).device) for name, value in tensors.items())
    for name, device in others:
        if device != there:
            raise InputError(f"{name} must be on the device of {first}, {there}, got {device}")


def batch(value: Tensor, name: str) -> Tensor:
    """A batch of inputs of any shape: floating point, at least one row, finite."""
    x = checks.tensor(value, name)
    if x.ndim == 0 or x.numel() == 0 or not x.is_floating_point():
        raise InputError(f"{name} must be floating point with at least one row, got {checks.described(x)}")
    return checks.finite(x, name)


def reduced(values: Tensor, reduction: Reduction) -> Tensor:
    """The mean or the sum of `values`, or `values` as they are."""
    if reduction == "none":
        return values
    return values.mean() if reduction == "mean" else values.sum()
