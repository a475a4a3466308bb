"""Progress bars that library code may always ask for and only a display shows.

Library code wraps its loops in `track`; the command line, or a caller who wants to see them, opens a `display`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")
_display: ContextVar[Progress | None] = ContextVar("trimtab_progress", default=None)


@contextmanager
def display(enabled: bool = True) -> Iterator[None]:
    """Show the bars of every `track` inside this block, on standard error where that is a terminal.

    Args:
        enabled: False leaves an already open display as it is and opens none.
    """
    if not enabled or _display.get() is not None:
        yield
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        token = _display.set(progress)
        try:
            yield
        finally:
            _display.reset(token)


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate over `items`; if a `display` is open, show a bar named `description`."""
    progress = _display.get()
    if progress is None:
        yield from items
        return
    if total is None and isinstance(items, Sized):
        total = len(items)
    task = progress.add_task(description, total=total)
    try:
        for item in items:
            yield item
            progress.advance(task)
    finally:
        progress.remove_task(task)
