"""Tables: what a command found -> lines for people, on standard error unless they are the result itself."""

from __future__ import annotations

from collections.abc import Sequence

import typer
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

# Characters that a name has in any console before it is broken; a third of wide ones.
_LEAST_NAME = 12

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


def figures_tables(columns: Sequence[str], rows: Sequence[Sequence[str | Text]], console: Console) -> list[Table]:
    """Names and figures, the first column being the names: one table, or several where it is too wide.

    So nothing is cut. Names that take more than a third of the console are broken.
    """
    tables, begin = [], 1
    while begin < len(columns):
        end = len(columns)
        while end > begin + 1 and _width(_figures(columns, rows, begin, end, console.width), console) > console.width:
            end -= 1
        tables.append(_figures(columns, rows, begin, end, console.width))
        begin = end
    return tables


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


def _figures(columns: Sequence[str], rows: Sequence[Sequence[str | Text]], begin: int, end: int, width: int) -> Table:
    table = plain_table()
    table.add_column(columns[0], overflow="fold", max_width=max(_LEAST_NAME, width // 3))
    for column in columns[begin:end]:
        table.add_column(column, no_wrap=True, justify="right")
    for name, *figures in rows:
        table.add_row(name, *figures[begin - 1 : end - 1])
    return table


def _width(table: Table, console: Console) -> int:
    return Measurement.get(console, console.options.update(max_width=1000), table).maximum


def _console(*, error: bool) -> Console:
    console = Console(stderr=error, highlight=False)
    return console if console.is_terminal else Console(stderr=error, highlight=False, width=_PIPE_WIDTH)
