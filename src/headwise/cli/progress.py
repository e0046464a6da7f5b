"""Progress: how much of a run is done -> a bar on a terminal, and lines elsewhere, on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from headwise.cli.tables import message


@contextmanager
def waiting(what: str) -> Iterator[Callable[[], None]]:
    """On a terminal, words and how long it has been, until what is given is called or the block ends; else nothing."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda: None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    bar = Progress(*columns, console=console, transient=True)
    bar.add_task(what, total=None)
    bar.start()
    try:
        # What is stopped twice stays stopped.
        yield bar.stop
    finally:
        bar.stop()


@contextmanager
def progress() -> Iterator[Callable[[int, int, str], None]]:
    """What takes how much is done, of how much, and a word on the last of it."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda done, total, what: message(f"{done} of {total}: {what}\n")
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("loading", total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)
