"""The table that grows while an adapter follows its stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.table import Table

if TYPE_CHECKING:
    from trimtab.audit.adapt import Leg

_ROWS = 12


@contextmanager
def watching(title: str, shown: bool) -> Iterator[Callable[[Sequence[Leg]], None]]:
    """A function to call with all legs so far: on a terminal the table grows, elsewhere it is printed at the end."""
    console = Console()
    last: list[Leg] = []
    with Live(console=console, auto_refresh=False, transient=True) as live:

        def watch(legs: Sequence[Leg]) -> None:
            last[:] = legs
            if shown and console.is_terminal:
                live.update(table(title, legs), refresh=True)

        yield watch
    if shown:
        console.print(table(title, last))


def table(title: str, legs: Sequence[Leg]) -> Table:
    """The last legs, one a row, and all of them together."""
    grid = Table(title=title, title_justify="left")
    for name in ("batches", "accuracy", "entropy", "updates", "skipped", "resets", "collapses", "ms a batch"):
        grid.add_column(name, justify="right")
    done = sum(leg.batches for leg in legs[:-_ROWS])
    if done:
        grid.add_row(f"1 to {done}", *_cells(legs[:-_ROWS]))
    for leg in legs[-_ROWS:]:
        grid.add_row(f"{done + 1} to {done + leg.batches}", *_cells([leg]))
        done += leg.batches
    if legs:
        grid.add_section()
        grid.add_row("all", *_cells(legs))
    return grid


def _cells(legs: Sequence[Leg]) -> list[str]:
    samples, batches = sum(leg.samples for leg in legs), sum(leg.batches for leg in legs)
    right = [leg.correct for leg in legs if leg.correct is not None]
    last = legs[-1]
    return [
        f"{sum(right) / samples:.3f}" if right else "",
        f"{sum(leg.entropy * leg.samples for leg in legs) / samples:.3f}",
        str(last.updates),
        str(last.skipped),
        str(last.resets),
        "" if last.collapses is None else str(last.collapses),
        f"{1000 * sum(leg.seconds for leg in legs) / batches:.1f}",
    ]
