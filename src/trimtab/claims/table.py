"""Results of claims for people: one table, read from the published files and nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.table import Table

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
    """One row an expectation, grouped by claim."""
    drawn = Table("claim", "verdict", "expected", "measured", "seeds", highlight=False, pad_edge=False)
    for result in results:
        verdict = result["verdict"]
        first = (f"[bold]{result['slug']}[/]", f"[{_STYLES[verdict]}]{verdict}[/]", "", "", str(len(result["values"])))
        drawn.add_row(*first)
        for expectation in result["expectations"]:
            style = _STYLES[expectation["verdict"]]
            words = f"[{style}]{expectation['verdict']}[/]"
            drawn.add_row("", words, expectation["text"], effect(expectation), "")
        drawn.add_section()
    return drawn
