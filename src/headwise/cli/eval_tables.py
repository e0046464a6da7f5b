"""Eval tables: the results of an evaluation -> lines for people, on standard output."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from headwise.cli.tables import facts_table, figures_tables, output


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
        for table in figures_tables(grid.columns, grid.rows, console):
            console.print(table)
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
