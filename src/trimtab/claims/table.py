"""Results of claims for people, read from the published files and nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

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


def table(results: Iterable[dict[str, Any]]) -> Group:
    """Each claim with its verdict and, below it, what every expectation measured."""
    drawn: list[RenderableType] = []
    for result in results:
        held = [expectation["verdict"] for expectation in result["expectations"]].count("holds")
        seeds = (
            f", {len(result['values'])} seeds, {held} of {len(result['expectations'])} expectations hold"
            if held
            else ""
        )
        drawn += [Text.from_markup(f"[bold]{result['slug']}[/]  {_coloured(result)}{seeds}"), Text(result["statement"])]
        rows = Table.grid(Column(no_wrap=True), Column(no_wrap=True), Column(), padding=(0, 2))
        for expectation in result["expectations"]:
            rows.add_row(_coloured(expectation), escape(effect(expectation)), escape(expectation["text"]))
        drawn += [Padding(rows, (0, 0, 1, 2))]
    return Group(*drawn)


def _coloured(judged: dict[str, Any]) -> str:
    verdict = judged["verdict"]
    return f"[{_STYLES[verdict]}]{verdict}[/]"
