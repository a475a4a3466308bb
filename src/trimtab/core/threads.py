"""One thread for work in small pieces."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch's CPU kernels run in the calling thread alone; a context, or a decorator as ``@one_thread()``.

    Work that goes through the data in blocks that fit the cache makes thousands of small kernel calls. Handing each out
    to several threads saves little, and on a machine with other work it waits thousands of times for a thread to be
    scheduled: ten times slower, or worse. Other Python threads keep their number.

    Example:
        >>> import torch
        >>> before = torch.get_num_threads()
        >>> with one_thread():
        ...     torch.get_num_threads()
        1
        >>> torch.get_num_threads() == before
        True
    """
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    # that number holds for this thread and for those that are yet to start: give the latter the old one back
    other = Thread(target=torch.set_num_threads, args=(threads,))
    other.start()
    other.join()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
