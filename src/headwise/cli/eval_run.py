"""Eval run: tasks, a lineup and the options of a run -> its results, with a bar while it runs, and words at its end."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from headwise.cli.eval_options import RunOptions
from headwise.cli.eval_tables import show_results
from headwise.cli.invocation import command_line
from headwise.cli.loading import quieten_loader
from headwise.cli.tables import message

if TYPE_CHECKING:
    from headwise.eval.lineup import Entry
    from headwise.eval.run import Results, Tell
    from headwise.eval.task import Task

_INTERRUPTED = 130


def carry_out(tasks: Sequence[Task], lineup: Sequence[Entry], given: RunOptions) -> Results:
    """Run the tasks as the options say; what there is, when interrupted."""
    from headwise.eval.run import run

    executor = given.executor()
    quieten_loader()
    command = command_line()
    with progress() as tell:
        return run(tasks, lineup, executor, given.out, seed=given.seed, command=command, resume=given.resume, tell=tell)


def present(results: Results, given: RunOptions) -> None:
    """Show what came out; leaves with 130 when interrupted."""
    if given.json_output:
        typer.echo(json.dumps(results.to_dict(), indent=2, allow_nan=False))
    else:
        show_results(results.to_dict())
    if results.interrupted:
        message(f"go on with --resume; what is finished lies in {given.out}\n")
        raise typer.Exit(_INTERRUPTED)


@contextmanager
def progress() -> Iterator[Tell]:
    """A bar on a terminal, and lines elsewhere; both on standard error."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda done, total, what: message(f"{done} of {total}: {what}\n")
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("loading", total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)
