"""Tables of figures: as many as the console needs, none of which cuts a figure."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from headwise.cli.tables import figures_tables

COLUMNS = ("", "tokens/s", "range", "x stock", "kept")
ROWS = [["keep 50%", "1,303", "1,301..1,306", "1.00", "50.0%"], ["full", "36.83", "33.10..37.02", "2.11", "100.0%"]]


def printed(width):
    console = Console(file=io.StringIO(), width=width)
    tables = figures_tables(COLUMNS, ROWS, console)
    for table in tables:
        console.print(table)
    return console.file.getvalue(), len(tables)


@pytest.mark.parametrize(("width", "count"), [(200, 1), (60, 1), (45, 2), (30, 3), (28, 4)])
def test_no_figure_is_cut_and_every_table_has_the_names(width, count):
    text, tables = printed(width)
    assert tables == count
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    for column in COLUMNS[1:]:
        assert text.count(column) == 1
    for name, *figures in ROWS:
        assert sum(line.lstrip().startswith(name) for line in text.splitlines()) == tables
        assert all(figure in text for figure in figures)


def test_a_figure_that_is_wider_than_the_console_has_a_table_of_its_own():
    text, tables = printed(12)
    assert tables == len(COLUMNS) - 1
    assert max(map(len, text.splitlines())) <= 12


def test_a_long_name_is_broken_and_not_cut():
    console = Console(file=io.StringIO(), width=60)
    name = "auto:ratio=0.0625,gate=true,of=prompt+match:ahead=0"
    for table in figures_tables(("policy", "kl", "kept"), [[name, "0.0081", "6.2%, 2.81 MiB"]], console):
        console.print(table)
    lines = console.file.getvalue().splitlines()
    assert "".join(line.split("  ")[0].strip() for line in lines if "─" not in line).removeprefix("policy") == name
    assert max(map(len, lines)) <= 60 and "0.0081" in console.file.getvalue()
