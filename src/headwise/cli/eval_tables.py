"""Eval tables: the results of an evaluation -> lines for people, on standard output."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from headwise.cli.tables import facts_table, output, plain_table

if TYPE_CHECKING:
    from headwise.eval.tables import Grid


# Of the policies' names, which are broken where there is no room for them.
_LEAST_WIDTH = 16


def show_results(results: dict[str, Any]) -> None:
    """Every table, and what they were measured on.

    Args:
        results: as `results.json` has them.
    """
    from headwise.eval.tables import LEGEND, make_grids

    console = output()
    console.print(_setting(results))
    for grid in make_grids(results["summaries"]):
        console.print(Text(f"\n{grid.title}", style="bold"))
        console.print(_table(grid))
    console.print(Text(LEGEND, style="dim"))


def _setting(results: dict[str, Any]) -> Table:
    from headwise.eval.setting import machine_words

    model = results["model"]
    table = facts_table()
    table.add_row("model", f"{model['name']}, {model['dtype']}")
    table.add_row("machine", machine_words(results["machine"]))
    table.add_row("versions", ", ".join(f"{name} {version}" for name, version in results["versions"].items()))
    if results["interrupted"]:
        table.add_row("", Text("interrupted: rows may be of different items", style="yellow"))
    return table


def _table(grid: Grid) -> Table:
    table = plain_table(*grid.columns)
    table.columns[0].overflow, table.columns[0].min_width = "fold", _LEAST_WIDTH
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for row in grid.rows:
        table.add_row(*row)
    return table
