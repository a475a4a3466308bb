"""Files that appear whole or not at all, and tensors without pickle.

`atomic` is the one way trimtab writes a file; `save` and `load` keep tensors in safetensors with a JSON file beside
them for everything that is not a tensor.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor

from trimtab.core.checks import InputError


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary path in the folder of `path`; renamed to it when the block ends well, removed when it does not.

    Raises:
        InputError: the file system refuses (no space left, no permission, not a folder).

    Example:
        >>> import tempfile; from pathlib import Path
        >>> target = Path(tempfile.mkdtemp()) / "numbers.txt"
        >>> with atomic(target) as draft:
        ...     _ = draft.write_text("1 2 3")
        >>> target.read_text()
        '1 2 3'
    """
    path = Path(path)
    draft: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
        draft = Path(name)
        os.close(handle)
        yield draft
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        draft.chmod(0o666 & ~umask)
        draft.replace(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        if draft is not None:
            draft.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    with atomic(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as JSON to `path`, whole or not at all; NaN and infinity are written as null."""
    write_text(path, json.dumps(_plain(value), indent=2, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def save(path: str | Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write `tensors` to `path` (safetensors) and `meta` to the same name with the ending ``.json``.

    The tensors come last: a reader that finds them finds their description too.
    """
    path = Path(path)
    write_json(path.with_suffix(".json"), meta)
    with atomic(path) as draft:
        draft.write_bytes(serialise({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}))


def load(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save` wrote.

    Raises:
        InputError: a file is missing, truncated or not what its name says.
    """
    path = Path(path)
    try:
        return load_file(str(path)), json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (SafetensorError, json.JSONDecodeError, FileNotFoundError, UnicodeDecodeError) as error:
        raise InputError(f"{path} and its .json cannot be read: {error}") from error


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A short hash of named tensors, in whatever order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
