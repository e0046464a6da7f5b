"""Tables: what a command found -> lines for people, on standard error unless they are the result itself."""

from __future__ import annotations

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

# A pipe has no width; this one holds the longest rule names.
_PIPE_WIDTH = 120


def output() -> Console:
    """Standard output, for results."""
    return _console(error=False)


def errors() -> Console:
    """Standard error, for everything else."""
    return _console(error=True)


def heading(title: str) -> None:
    """A line across standard error with a title in it."""
    errors().rule(Text(title, style="bold"), align="left", style="dim")


def message(text: str) -> None:
    """Text as it is, to standard error."""
    typer.echo(text, nl=False, err=True)


def plain_table(*columns: str) -> Table:
    """A table without frames; its columns are named."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column)
    return table


def facts_table(*columns: str) -> Table:
    """A table of names and what is said about them, one fact per row.

    Args:
        columns: headings over the facts, where there are several of each name; none for a single one without.
    """
    table = Table(
        box=box.SIMPLE_HEAD if columns else None, show_header=bool(columns), pad_edge=False, padding=(0, 2, 0, 0)
    )
    table.add_column(style="dim", no_wrap=True)
    for column in columns or ("",):
        table.add_column(column)
    return table


def _console(*, error: bool) -> Console:
    console = Console(stderr=error, highlight=False)
    return console if console.is_terminal else Console(stderr=error, highlight=False, width=_PIPE_WIDTH)
