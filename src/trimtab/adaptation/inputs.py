"""What an adapter is given, checked at its door: a tensor or a mapping of them, finite and without labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Shaped
from torch import Tensor

from trimtab.core import checks
from trimtab.core.checks import InputError

Inputs = Shaped[Tensor, "n ..."] | Mapping[str, Any]


def checked_size(x: Any) -> int:
    """The number of inputs of a batch that holds tensors, finite, and no labels.

    Raises:
        InputError: it does not.
    """
    if isinstance(x, Mapping):
        for name in ("labels", "label"):
            if name in x:
                raise InputError(f"x must not hold {name!r}: an adapter learns from inputs alone")
        tensors = {f"x[{name!r}]": value for name, value in x.items() if isinstance(value, Tensor)}
    elif isinstance(x, Tensor):
        tensors = {"x": x}
    else:
        raise InputError(f"x must be a tensor or a mapping of inputs, without labels, got {type(x).__name__}")
    if not tensors or any(value.ndim == 0 or len(value) == 0 for value in tensors.values()):
        raise InputError("x must hold at least one input, got an empty batch")
    for name, value in tensors.items():
        checks.finite(value, name)
    return len(next(iter(tensors.values())))


def usable(x: Inputs) -> Inputs:
    """The batch in tensors that gradients may be computed beside, though they were made in inference mode."""
    if isinstance(x, Mapping):
        return {name: usable(value) if isinstance(value, Tensor) else value for name, value in x.items()}
    return x.detach().clone() if x.is_inference() else x.detach()
