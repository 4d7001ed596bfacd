"""A bar on standard error for what turns out to take long."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from typing import TypeVar

T = TypeVar("T")
_PATIENCE = 2.0  # seconds before anything is shown


def with_progress(items: Collection[T], what: str) -> Iterator[T]:
    """Yield the items; from two seconds on, show how far it is (on a terminal only).

    Args:
        items: What is gone through.
        what: A few words that stand before the bar.
    """
    from rich.console import Console
    from rich.progress import Progress

    started = time.monotonic()
    bar = row = None
    try:
        for done, item in enumerate(items):
            if bar is None and time.monotonic() - started > _PATIENCE:
                console = Console(stderr=True)
                bar = Progress(console=console, transient=True, disable=not console.is_terminal)
                bar.start()
                row = bar.add_task(what, total=len(items))
            if bar is not None and row is not None:
                bar.update(row, completed=done)
            yield item
    finally:
        if bar is not None:
            bar.stop()
