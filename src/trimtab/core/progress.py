"""Long loops: progress bars that only a display shows, and a time limit that the loops keep.

Library code wraps its loops in `track`. The command line, or a caller who wants to see the bars, opens a `display`;
who has only so much time sets a `limit`, and a loop that is still running when the time is up raises `OutOfTime`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trimtab.core.errors import InputError

T = TypeVar("T")
_display: ContextVar[Progress | None] = ContextVar("trimtab_progress", default=None)
_deadline: ContextVar[float] = ContextVar("trimtab_deadline", default=float("inf"))


class OutOfTime(Exception):
    """The time that a `limit` gave is up."""


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Let `in_time`, and with it every `track`, raise `OutOfTime` once this block has taken `seconds`."""
    token = _deadline.set(min(_deadline.get(), time.monotonic() + seconds))
    try:
        yield
    finally:
        _deadline.reset(token)


def in_time() -> None:
    """Go on, or raise `OutOfTime`: for long work that is no loop over items."""
    if time.monotonic() > _deadline.get():
        raise OutOfTime("the time limit was reached")


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
    """Iterate over `items` as long as the time `limit` allows; if a `display` is open, show a bar named `description`.

    Raises:
        OutOfTime: the time was up before an item.
    """
    progress = _display.get()
    if total is None and isinstance(items, Sized):
        total = len(items)
    task = None if progress is None else progress.add_task(description, total=total)
    try:
        for item in items:
            in_time()
            yield item
            if progress is not None and task is not None:
                progress.advance(task)
    finally:
        if progress is not None and task is not None:
            progress.remove_task(task)


def endless(items: Iterable[T], name: str = "loader") -> Iterator[T]:
    """Iterate over `items`, called `name`, again and again: for training that counts steps.

    Raises:
        InputError: there are none, or none the second time.

    Example:
        >>> from itertools import islice
        >>> list(islice(endless("ab"), 5))
        ['a', 'b', 'a', 'b', 'a']
    """
    while True:
        empty = True
        for item in items:
            empty = False
            yield item
        if empty:
            raise InputError(f"{name} must yield something each time that it is begun, it yielded nothing")
