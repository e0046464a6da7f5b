"""Eval run: tasks, contenders and the options of a run -> its results, with a bar while it runs, shown at its end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from headwise.cli.eval_options import RunOptions
from headwise.cli.eval_tables import show_results
from headwise.cli.exit_codes import INTERRUPTED
from headwise.cli.invocation import command_line
from headwise.cli.loading import quieten_loader
from headwise.cli.progress import progress
from headwise.cli.tables import message

if TYPE_CHECKING:
    from headwise.eval.contenders import Contender
    from headwise.eval.run import Results
    from headwise.eval.task import Task


def run_tasks(tasks: Sequence[Task], contenders: Sequence[Contender], given: RunOptions) -> Results:
    """Run the tasks as the options say; what there is, when interrupted."""
    from headwise.eval.run import run

    executor = given.executor()
    quieten_loader()
    command = command_line()
    with progress() as tell:
        return run(
            tasks, contenders, executor, given.out, seed=given.seed, command=command, resume=given.resume, tell=tell
        )


def present(results: Results, given: RunOptions) -> None:
    """Show what came out; leaves with 130 when interrupted."""
    if given.json_output:
        typer.echo(json.dumps(results.to_dict(), indent=2, allow_nan=False))
    else:
        show_results(results.to_dict())
    if results.interrupted:
        message(f"go on with --resume; what is finished lies in {given.out}\n")
        raise typer.Exit(INTERRUPTED)
