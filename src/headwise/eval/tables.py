"""Tables: the results of a run, as JSON has them -> rows of words, whoever shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headwise.units import format_bytes

_NOTHING = "-"

# What stands behind a primary metric whose difference to random eviction is surely not zero.
BETTER, WORSE = "+", "−"

LEGEND = (
    f"means over items, with 95 % bootstrap intervals; {BETTER} better and {WORSE} worse than random eviction of the"
    " same size on the same items, beyond the interval of the difference; kept: rows and bytes at the end of the"
    " context; aware: the question is there while compressing, agnostic: it comes after"
)

# For titles; the headings of columns have the last word of it.
QUERIES = {"none": "", "aware": "query-aware", "agnostic": "query-agnostic"}

# Of a row of random eviction; the row that it belongs to is the one before.
_TWIN = "  same size at random"


@dataclass(frozen=True)
class Grid:
    """A table: a title, headings, and as many words in every row."""

    title: str
    columns: list[str]
    rows: list[list[str]]


def make_grids(summaries: Sequence[Mapping[str, Any]]) -> list[Grid]:
    """One table per title; query-aware and query-agnostic runs stand in columns of their own.

    Args:
        summaries: as `summarise` makes them.
    """
    titles = dict.fromkeys(summary["title"] for summary in summaries)
    return [_grid(title, [summary for summary in summaries if summary["title"] == title]) for title in titles]


def _grid(title: str, summaries: list[Mapping[str, Any]]) -> Grid:
    found = [row for summary in summaries for row in summary["rows"]]
    names = {row["policy"]: row["policy"] if row["twin_of"] is None else _TWIN for row in found}
    blocks = [_block(summary) for summary in summaries]
    columns = [column for headings, _ in blocks for column in headings]
    rows = [[name, *(cell for block in blocks for cell in _cells(block, policy))] for policy, name in names.items()]
    return Grid(f"{title}, {max((row['items'] for row in found), default=0)} items", ["policy", *columns], rows)


Block = tuple[list[str], dict[str, list[str]]]


def _block(summary: Mapping[str, Any]) -> Block:
    """The columns of one query mode: headings, and cells by policy."""
    metrics = dict.fromkeys(name for row in summary["rows"] for name in row["metrics"])
    headings = [*metrics, "kept", "compress"]
    query = "" if summary["query"] == "none" else summary["query"]
    cells = {
        row["policy"]: [*(_metric(summary, row, name) for name in metrics), *_costs(row)] for row in summary["rows"]
    }
    return ["\n".join([*heading.split("_"), query]).strip() for heading in headings], cells


def _cells(block: Block, policy: str) -> list[str]:
    headings, cells = block
    return cells.get(policy, [_NOTHING] * len(headings))


def _metric(summary: Mapping[str, Any], row: Mapping[str, Any], name: str) -> str:
    estimate = row["metrics"].get(name)
    if estimate is None:
        return _NOTHING
    mean = f"{estimate['mean']:.3g}"
    if name != summary["primary"]:
        return mean
    interval = "" if estimate["low"] is None else f" [{estimate['low']:.3g}, {estimate['high']:.3g}]"
    return f"{mean}{_sign(summary, row)}{interval}"


def _sign(summary: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    gain = row["over_random"]
    if gain is None or gain["low"] is None or gain["low"] <= 0 <= gain["high"]:
        return ""
    return BETTER if (gain["low"] > 0) == summary["higher_is_better"] else WORSE


def _costs(row: Mapping[str, Any]) -> list[str]:
    kept = f"{row['kept_ratio']:.1%}, {format_bytes(round(row['used_bytes']))}"
    return [kept, f"{row['compress_seconds']:.2f} s"]
