"""Input validation: every public function checks what it is given once, at the door, with these functions.

Each returns the checked value as a tensor (or number), on the device and in the precision it came in, and raises
`InputError` with the argument's name, what was expected, and the first offending index.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.core.errors import InputError as InputError
from trimtab.core.precision import doubled


def tensor(value: Any, name: str) -> Tensor:
    """`value` as a tensor, without a copy where the container allows it."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind in "OUSV":
        raise InputError(f"{name} must be numeric, got an array of dtype {value.dtype}")
    try:
        # a copy for read-only arrays: torch cannot express them and warns
        array = np.asarray(value)
        return torch.from_numpy(array if array.flags.writeable else array.copy())
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} must be a numeric tensor or array, got {type(value).__name__}") from error


def unread(value: Tensor) -> bool:
    """Whether values cannot be looked at: while a graph is traced by `torch.compile`, and on the meta device."""
    return torch.compiler.is_compiling() or value.is_meta


def described(value: Tensor) -> str:
    """The type and the shape of a tensor, in words: ``float32 (3, 2)``."""
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"


def first_bad(bad: Tensor) -> str:
    """Where the first true entry of `bad` is, in words: ``row 3, column 1``."""
    if bad.ndim == 0:
        return "its only place"
    index = [int(i) for i in np.unravel_index(int(bad.flatten().to(torch.uint8).argmax()), tuple(bad.shape))]
    names = ("row", "column") if bad.ndim <= 2 else tuple(f"axis {axis} index" for axis in range(bad.ndim))
    return ", ".join(f"{axis} {i}" for axis, i in zip(names, index))


def finite(value: Tensor, name: str) -> Tensor:
    """Refuse NaN and infinities."""
    if not value.is_floating_point() or value.numel() == 0 or unread(value):
        return value
    # a finite sum tells in a thirtieth of the time that isfinite takes; one that overflows tells nothing
    if not math.isfinite(value.detach().sum().item()) and not bool(torch.isfinite(value).all()):
        bad = ~torch.isfinite(value)
        what = value.flatten()[bad.flatten().to(torch.uint8).argmax()].item()
        raise InputError(f"{name} must be finite, found {what} at {first_bad(bad)}")
    return value


def within(value: Tensor, name: str, low: float, high: float) -> Tensor:
    """Refuse what does not lie in low..high, NaN and infinities too."""
    if value.numel() == 0 or unread(value):
        return value
    least, most = torch.aminmax(value.detach())
    if not low <= least.item() <= most.item() <= high:
        bad = (finite(value, name) < low) | (value > high)
        raise InputError(
            f"{name} must lie in [{low:g}, {high:g}], found {value[bad][0].item():.6g} at {first_bad(bad)}"
        )
    return value


def matrix(value: Any, name: str, *, columns: int | None = None, min_columns: int = 1) -> Float[Tensor, "n c"]:
    """A finite floating-point (n, c) tensor with n >= 1."""
    return finite(_shaped(value, name, columns, min_columns), name)


def _shaped(value: Any, name: str, columns: int | None, min_columns: int) -> Tensor:
    """`matrix` without a look at the values."""
    x = tensor(value, name)
    if x.ndim != 2:
        raise InputError(f"{name} must have shape (n, c), got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise InputError(f"{name} must be floating point, got {str(x.dtype).removeprefix('torch.')}")
    if x.shape[0] == 0:
        raise InputError(f"{name} must have at least one row, got {tuple(x.shape)}")
    if columns is not None and x.shape[1] != columns:
        raise InputError(f"{name} must have {columns} columns, got {x.shape[1]}")
    if x.shape[1] < min_columns:
        raise InputError(f"{name} must have at least {min_columns} columns, got {x.shape[1]}")
    return x


def logits(value: Any, name: str = "logits", *, classes: int | None = None) -> Float[Tensor, "n c"]:
    """Logits or log-probabilities: a finite floating-point (n, c) tensor, n >= 1, c >= 2."""
    return matrix(value, name, columns=classes, min_columns=2)


def probabilities(value: Any, name: str = "probs", *, atol: float = 1e-3) -> Float[Tensor, "n c"]:
    """Probabilities: an (n, c) tensor in [0, 1] whose rows sum to one within `atol`."""
    p = _shaped(value, name, None, 2)
    if unread(p):
        return p
    low, high = torch.aminmax(p.detach())
    if not bool((low >= 0) & (high <= 1 + atol)):
        bad = (finite(p, name) < 0) | (p > 1 + atol)
        value_there = p.flatten()[bad.flatten().to(torch.uint8).argmax()].item()
        raise InputError(f"{name} must lie in [0, 1], found {value_there:.6g} at {first_bad(bad)}")
    total = p.detach().sum(1, dtype=torch.promote_types(p.dtype, torch.float32))
    bad = (total - 1).abs() > atol
    if bool(bad.any()):
        row = int(bad.to(torch.uint8).argmax())
        raise InputError(f"{name} must sum to one in every row (within {atol:g}), row {row} sums to {total[row]:.6g}")
    return p


def labels(value: Any, n: int, c: int | None, name: str = "labels") -> Int[Tensor, " n"]:
    """Class indices: n integers in 0..c-1, or any that are not negative, as int64."""
    y = tensor(value, name)
    if y.ndim != 1:
        raise InputError(f"{name} must have shape (n,), got {tuple(y.shape)}")
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise InputError(f"{name} must be integer class indices, got {str(y.dtype).removeprefix('torch.')}")
    if y.shape[0] != n:
        raise InputError(f"{name} must have {n} entries, one for each row, got {y.shape[0]}")
    y = y.long()
    if y.numel() == 0 or unread(y):
        return y
    # a third of the time that two comparisons take
    low, high = torch.aminmax(y)
    if low.item() < 0 or (c is not None and high.item() >= c):
        wrong, wanted = (y < 0, "be >= 0") if c is None else ((y < 0) | (y >= c), f"lie in 0..{c - 1}")
        row = int(wrong.to(torch.uint8).argmax())
        raise InputError(f"{name} must {wanted}, found {int(y[row])} at row {row}")
    return y


def weights(value: Any, n: int, name: str = "weights") -> Float[Tensor, " n"]:
    """Sample weights: n finite numbers >= 0, not all zero."""
    w = tensor(value, name)
    if w.shape != (n,):
        raise InputError(f"{name} must have shape ({n},), got {tuple(w.shape)}")
    if w.is_complex() or w.dtype == torch.bool:
        raise InputError(f"{name} must be real numbers, got {str(w.dtype).removeprefix('torch.')}")
    w = finite(w if w.is_floating_point() else doubled(w), name)
    if unread(w):
        return w
    if bool((w < 0).any()):
        raise InputError(f"{name} must be >= 0, found {w[w < 0][0].item():.6g} at {first_bad(w < 0)}")
    if not bool((w > 0).any()):
        raise InputError(f"{name} must not be all zero")
    return w


def views(value: Any, n: int, c: int, name: str = "views") -> Float[Tensor, "n v c"]:
    """Logits of augmented copies: a finite floating-point (n, v, c) tensor, v >= 1."""
    x = tensor(value, name)
    if x.ndim != 3 or x.shape[0] != n or x.shape[2] != c or x.shape[1] == 0:
        raise InputError(f"{name} must have shape ({n}, v, {c}) with v >= 1, got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise InputError(f"{name} must be floating point, got {str(x.dtype).removeprefix('torch.')}")
    return finite(x, name)


def number(
    value: float | np.integer | np.floating,
    name: str,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    low_open: bool = False,
    high_open: bool = False,
) -> float:
    """A finite number in the given interval; `low_open` and `high_open` leave out its ends."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise InputError(f"{name} must be a number, got {type(value).__name__}")
    inside = (value > low if low_open else value >= low) and (value < high if high_open else value <= high)
    if not (math.isfinite(value) and inside):
        left = "(" if low_open or low == -math.inf else "["
        right = ")" if high_open or high == math.inf else "]"
        raise InputError(f"{name} must lie in {left}{low:g}, {high:g}{right}, got {value:g}")
    return float(value)


def integer(value: int | np.integer, name: str, *, low: int | None = None, high: int | None = None) -> int:
    """An integer in the closed interval low..high."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise InputError(f"{name} must be an integer, got {type(value).__name__}")
    if low is not None and value < low:
        raise InputError(f"{name} must be at least {low}, got {value}")
    if high is not None and value > high:
        raise InputError(f"{name} must be at most {high}, got {value}")
    return int(value)


def generator(value: Any, *, seed: int | None = None, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of random numbers; where there is a `seed`, None is a new one with it, on the device."""
    if value is None and seed is not None:
        return torch.Generator(device).manual_seed(seed)
    if not isinstance(value, torch.Generator):
        raise InputError(f"generator must be a torch.Generator, got {type(value).__name__}")
    return value


def function(value: Any, name: str) -> Any:
    """Something to be called: a function or a module, no class in the place of an instance."""
    if isinstance(value, type) or not callable(value):
        got = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
        raise InputError(f"{name} must be a function or a module, got {got}")
    return value


def loader(value: Any, name: str = "loader") -> Any:
    """Something to be gone through batch by batch, as a `DataLoader` is; a data set, which is not, is none."""
    if not isinstance(value, Iterable):
        raise InputError(f"{name} must yield batches, as a DataLoader does, got {type(value).__name__}")
    return value


def one_of(value: Any, name: str, kind: object) -> Any:
    """One of the values of a `Literal`."""
    if value not in get_args(kind):
        raise InputError(f"{name} must be one of {', '.join(get_args(kind))}, got {value!r}")
    return value
