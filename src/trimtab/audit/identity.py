"""What tells one state of an audit's input from another, so that finished pieces serve again only where they may."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any

from torch import Tensor

from trimtab.audit import setup as setups
from trimtab.audit.setup import Setup
from trimtab.core.checks import InputError
from trimtab.core.persist import fingerprint


def marks(setup: Setup, spec: str | None, **more: Any) -> dict[str, Any]:
    """What tells one state of a setup from another: its code, its weights, and the beginning and length of its data.

    `more` loaders than the setup's calibration, test and shifts may be named.
    """
    loaders = {"calibration": setup.calibration, "test": setup.test, **setup.shifts, **more}
    marks = {name: [fingerprint(_first_tensors(name, loader)), _length(loader)] for name, loader in loaders.items()}
    code = Path((spec or "").rpartition(":")[0])
    return {
        "code": hashlib.sha256(code.read_bytes()).hexdigest()[:16] if code.suffix == ".py" else None,
        "model": fingerprint(setup.model.state_dict()),
        "data": marks,
        "collected": [setup.features, setup.views if setup.augment else 0],
    }


def _first_tensors(name: str, loader: Any) -> dict[str, Tensor]:
    try:
        batch = next(iter(loader))
    except StopIteration:
        raise InputError(f"{name} must yield at least one batch, it yielded none") from None
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{name} raised {setups.told(error)}") from error
    parts = (
        batch if isinstance(batch, Mapping) else dict(enumerate(batch if isinstance(batch, (tuple, list)) else [batch]))
    )
    return {str(key): value for key, value in parts.items() if isinstance(value, Tensor)}


def _length(loader: Any) -> int | None:
    return len(loader) if isinstance(loader, Sized) else None


def stamp(path: Path) -> list[Any]:
    """What tells one state of a file from another."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    stat = path.stat()
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns]
