"""Results of claims for people: one table, read from the published files and nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Column, Table

from trimtab import catalog

_STYLES = {"holds": "green", "undecided": "yellow", "fails": "red", "not measured": "dim"}


def read(folder: Path | None = None) -> list[dict[str, Any]]:
    """One result a method of the catalogue, in its order; ``"not measured"`` where there is none in `folder`."""
    missing: dict[str, Any] = {"statement": "", "verdict": "not measured", "expectations": [], "values": {}}
    return [catalog.result(m.slug, folder) or {"slug": m.slug, **missing} for m in catalog.methods()]


def effect(expectation: dict[str, Any]) -> str:
    """The measured effect with its interval: ``0.712 [0.655, 0.77]``."""
    estimate, low, high = (expectation["effect"][end] for end in ("estimate", "low", "high"))
    return f"{estimate:.4g} [{low:.4g}, {high:.4g}]"


def table(results: Iterable[dict[str, Any]]) -> Table:
    """A claim with its verdict, and below it what each expectation measured."""
    drawn = Table(Column("claim", no_wrap=True), "expected", "measured", "verdict", box=SIMPLE, pad_edge=False)
    for result in results:
        seeds = f"{len(result['values'])} seeds" if result["values"] else ""
        drawn.add_row(f"[bold]{result['slug']}[/]", f"[italic]{result['statement']}[/]", seeds, _coloured(result))
        for expectation in result["expectations"]:
            drawn.add_row("", escape(expectation["text"]), escape(effect(expectation)), _coloured(expectation))
        drawn.add_section()
    return drawn


def _coloured(judged: dict[str, Any]) -> str:
    verdict = judged["verdict"]
    return f"[{_STYLES[verdict]}]{verdict}[/]"
