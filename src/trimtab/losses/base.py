"""What the training objectives share: the door, precision, reduction.

A loss is an `nn.Module`; where the method allows it is called as ``loss(logits, labels)`` and returns the mean over the
batch. What needs more says so in its signature. Inputs of half precision are widened to float32 before anything is
exponentiated, so that a loss may be called within autocast. Values (NaN, labels out of range) are checked in eager mode
only: a graph that `torch.compile` traces does not wait for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trimtab.core import checks
from trimtab.core.checks import InputError
from trimtab.core.precision import full_precision as full_precision
from trimtab.core.precision import widened as widened
from trimtab.core.predictions import logits_of

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


def flat_labels(
    logits: Float[Tensor, "n c *shape"], labels: Int[Tensor, "n *shape"], ignore_index: int | None
) -> tuple[Int[Tensor, " m"], Bool[Tensor, " m"]]:
    """Checked labels of samples or pixels in one row, 0 where they are `ignore_index`, and which of them count."""
    if labels.shape != (len(logits), *logits.shape[2:]):
        raise InputError(f"labels must have shape {(len(logits), *logits.shape[2:])}, got {tuple(labels.shape)}")
    y = labels.flatten()
    counts = torch.ones_like(y, dtype=torch.bool) if ignore_index is None else y != ignore_index
    return checks.labels(y if ignore_index is None else y.where(counts, 0), len(y), logits.shape[1]), counts


def logits_from(model: Callable[..., Any], inputs: Any, name: str = "model", *, classes: int | None = None) -> Tensor:
    """What a network gives for a batch (see `logits_of`): floating point (n, c, ...), of `classes` where that is known.

    Raises:
        InputError: it gives something else.
    """
    logits = logits_of(model, inputs)
    if not isinstance(logits, Tensor) or logits.ndim < 2 or not logits.is_floating_point():
        got = checks.described(logits) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"{name} must give logits (n, c), floating point, got {got}")
    if classes is not None and logits.shape[1] != classes:
        raise InputError(f"{name} must give logits of {classes} classes, got {tuple(logits.shape)}")
    return logits


def same_device(**tensors: Tensor) -> None:
    """Refuse tensors that are not on one device, by the names they are given."""
    (first, there), *others = ((name, checks.tensor(value, name).device) for name, value in tensors.items())
    for name, device in others:
        if device != there:
            raise InputError(f"{name} must be on the device of {first}, {there}, got {device}")


def same_meta(**tensors: Tensor) -> None:
    """Refuse tensors of which some are on the meta device, where they hold no values, and some are not."""
    (first, there), *others = ((name, value.is_meta) for name, value in tensors.items())
    for name, meta in others:
        if meta != there:
            raise InputError(f"{name} must be on the meta device if {first} is, and only then")


def batch(value: Tensor, name: str) -> Tensor:
    """A batch of inputs of any shape: floating point, at least one row, finite."""
    x = checks.tensor(value, name)
    if x.ndim == 0 or x.numel() == 0 or not x.is_floating_point():
        raise InputError(f"{name} must be floating point with at least one row, got {checks.described(x)}")
    return checks.finite(x, name)


def scalar(value: Any, name: str) -> Float[Tensor, ""]:
    """What a part that the caller brings returns, refused where it is no tensor without axes."""
    if not isinstance(value, Tensor) or value.shape != ():
        got = checks.described(value) if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"{name} must return a scalar tensor, got {got}")
    return value


def reduced(values: Tensor, reduction: Reduction) -> Tensor:
    """The mean or the sum of `values`, or `values` as they are."""
    if reduction == "none":
        return values
    return values.mean() if reduction == "mean" else values.sum()
