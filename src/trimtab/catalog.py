"""The catalogue of methods: what there is, where it is, and which claim proves it. Reads text only, never torch."""

from __future__ import annotations

import ast
import difflib
import json
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from trimtab.core.errors import InputError

PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Method:
    """One entry of ``catalog.toml``; the file says what each field holds."""

    slug: str
    title: str
    arxiv: str
    stage: str
    file: str
    symbols: tuple[str, ...]
    summary: str
    claim: str
    status: str
    since: str
    parts: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The symbols, then the parts, as they are imported: ``trimtab.adaptation.EATA``."""
        parts = (part.split(".") for part in self.parts)
        own = (f"trimtab.{self.stage}.{symbol}" for symbol in self.symbols)
        return (*own, *(f"trimtab.{stage}.{symbol}" for stage, *_, symbol in parts))

    @property
    def imports(self) -> str:
        """The line of Python that imports them; a line for each stage where there are several."""
        stages: dict[str, list[str]] = {}
        for name in self.names:
            stage, _, symbol = name.rpartition(".")
            stages.setdefault(stage, []).append(symbol)
        return "\n".join(f"from {stage} import {', '.join(symbols)}" for stage, symbols in stages.items())

    @property
    def paper(self) -> str:
        """Address of the paper."""
        return f"https://arxiv.org/abs/{self.arxiv}"

    @property
    def rooms(self) -> tuple[Path, ...]:
        """The source files of the method alone."""
        return tuple(PACKAGE / self.stage / name.strip() for name in self.file.split(","))

    @property
    def files(self) -> tuple[Path, ...]:
        """The source files, those of the parts too, read from the package."""
        shared = (PACKAGE.joinpath(*part.split(".")[:-1]).with_suffix(".py") for part in self.parts)
        return tuple(dict.fromkeys((*self.rooms, *shared)))

    def docstring(self, symbol: str) -> str:
        """The docstring of one of its symbols or parts, read from the source without importing it."""
        for file in self.files:
            for node in ast.parse(file.read_text(encoding="utf-8")).body:
                if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == symbol:
                    return ast.get_docstring(node) or ""
        raise InputError(f"{symbol} is not in {', '.join(f.relative_to(PACKAGE).as_posix() for f in self.files)}")


@cache
def methods() -> tuple[Method, ...]:
    """Every method, in the order of the file.

    Example:
        >>> [m.slug for m in methods() if "EATA" in m.symbols]
        ['24-eata']
    """
    entries = tomllib.loads((PACKAGE / "catalog.toml").read_text(encoding="utf-8"))["method"]
    lists = ("symbols", "parts")
    return tuple(Method(**{**entry, **{name: tuple(entry.get(name, ())) for name in lists}}) for entry in entries)


def find(query: str) -> Method:
    """The method with this slug, slug without its number, or symbol.

    Raises:
        InputError: there is none; the message names near ones.

    Example:
        >>> find("eata").slug == find("24-eata").slug == find("ETA").slug
        True
    """
    known = {
        name.lower(): m
        for m in methods()
        for name in (m.slug, m.slug.partition("-")[2], *(name.rpartition(".")[2] for name in m.names))
    }
    if query.lower() in known:
        return known[query.lower()]
    near = difflib.get_close_matches(query.lower(), known, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "`trimtab list` shows what there is"
    raise InputError(f"no method is called {query!r}: {hint}")


def published() -> Path:
    """The folder of the results that were published with this copy of trimtab: one JSON file a claim."""
    shipped = PACKAGE / "results"
    return shipped if shipped.is_dir() else PACKAGE.parents[1] / "results"


def result(slug: str, folder: Path | None = None) -> dict[str, Any] | None:
    """What a method's claim measured, or None where no result lies in `folder` (by default, the published one).

    Raises:
        InputError: the file is not a result.
    """
    path = (folder or published()) / f"{slug}.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a result of `trimtab claims run`: {error}") from error
    if not isinstance(found, dict) or found.get("slug") != slug:
        raise InputError(f"{path} is not a result of the claim {slug}")
    return found
