"""Progress of long work: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["progress"]

_PLAIN_EVERY_S = 10.0


@contextmanager
def progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A function to call with (done, total); it shows ``title``, the share and the time left.

    Everything goes to standard error, so that ``--json -`` stays clean.
    """
    if sys.stderr.isatty():
        with _bar(title) as update:
            yield update
    else:
        yield _plain(title)


@contextmanager
def _bar(title: str) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)

        def update(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total or None)

        yield update


def _plain(title: str) -> Callable[[int, int], None]:
    started = last = time.monotonic()

    def update(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _PLAIN_EVERY_S:
            last = now
            of = f" of {total}" if total else ""
            left = f", {_left((now - started) / done * (total - done))}" if total and done else ""
            print(f"{title}: {done}{of}{left}", file=sys.stderr, flush=True)

    return update


def _left(seconds: float) -> str:
    """``seconds`` to go, as a person would say it."""
    if seconds < 60:
        return f"about {max(round(seconds), 1)} s left"
    return f"about {round(seconds / 60)} min left"
