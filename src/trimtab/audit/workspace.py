"""Finished pieces of an audit on disk, so that a killed run goes on where it was."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trimtab.core import persist
from trimtab.core.predictions import Predictions


class Workspace:
    """The folder ``.work`` inside an output folder: one file a finished piece, each written whole.

    Args:
        out: the audit's output folder.
        identity: what the pieces depend on (input, settings, version). A folder left by a run with another identity
            is emptied first.
        fresh: empty the folder in any case.
    """

    def __init__(self, out: Path, identity: dict[str, Any], *, fresh: bool = False) -> None:
        self.folder = out / ".work"
        self._identity = identity
        if fresh or not self._identity_file.is_file() or json.loads(self._identity_file.read_text()) != identity:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.seconds: dict[str, float] = {}

    def predictions(self, name: str, make: Callable[[], Predictions]) -> Predictions:
        """The predictions called `name`, made once."""
        path = self.file(name)
        self.number(name, lambda: make().write(path))
        return Predictions.read(path)

    def file(self, name: str) -> Path:
        """Where the predictions called `name` are kept."""
        return self._path(name).with_suffix(".npz")

    def number(self, name: str, make: Callable[[], Any]) -> Any:
        """The plain data (anything JSON can hold, NaN included) called `name`, made once and timed."""
        if not self.has(name):
            start = time.perf_counter()
            value = make()
            self.keep(name, value, time.perf_counter() - start)
        self.seconds[name] = self._entry(name)["seconds"]
        return self.kept(name)

    def kept(self, name: str) -> Any:
        """The finished piece called `name`."""
        return self._entry(name)["value"]

    def has(self, name: str) -> bool:
        """Whether the piece called `name` is finished."""
        return self._path(name).is_file()

    def keep(self, name: str, value: Any, seconds: float) -> None:
        """Keep a piece that was made elsewhere."""
        if not self._identity_file.is_file():
            persist.write_json(self._identity_file, self._identity)
        persist.write_text(self._path(name), json.dumps({"seconds": seconds, "value": value}))

    @property
    def _identity_file(self) -> Path:
        return self.folder / "identity.json"

    def _entry(self, name: str) -> dict[str, Any]:
        return json.loads(self._path(name).read_text(encoding="utf-8"))

    def _path(self, name: str) -> Path:
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"

    def remove(self) -> None:
        """Delete the folder: the audit is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)
