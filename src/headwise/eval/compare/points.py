"""Points: the results of a run -> what a panel of curves shows: a task's quality against bytes or against speed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from headwise.eval.contenders import FULL, RANDOM
from headwise.eval.speed import Speed
from headwise.eval.tables import QUERIES


@dataclass(frozen=True)
class Point:
    """One row of a table.

    Attributes:
        cost: bytes, or tokens per second.
        quality: mean of the task's primary metric; `low` and `high` are the ends of its interval, where it has one.
        front: whether no other row is as good in both and better in one.
    """

    label: str
    cost: float
    quality: float
    low: float | None
    high: float | None
    front: bool


@dataclass(frozen=True)
class Panel:
    """One task.

    Attributes:
        series: points of every policy, the smallest first; random eviction is the last, the full cache is not there.
        full: of the full cache; None where it is not finished.
    """

    title: str
    metric: str
    higher_is_better: bool
    series: dict[str, list[Point]]
    full: Point | None


def bytes_panels(results: dict[str, Any]) -> list[Panel]:
    """Quality of every task against the bytes that are kept of its contexts."""
    return [
        _panel(results, summary, {row["policy"]: row["used_bytes"] for row in summary["rows"]}, more_is_better=False)
        for summary in _compared(results)
    ]


def speed_panels(results: dict[str, Any]) -> list[Panel]:
    """Quality of every task against the tokens per second of the same policy."""
    speeds = {
        row["policy"]: row["metrics"][Speed.primary]["mean"]
        for summary in results["summaries"]
        if summary["title"] == Speed.name
        for row in summary["rows"]
    }
    return [_panel(results, summary, speeds, more_is_better=True) for summary in _compared(results)]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points are not beaten: no other is at least as high in both numbers and higher in one."""
    return [
        not any(other != point and other[0] >= point[0] and other[1] >= point[1] for other in points)
        for point in points
    ]


def _compared(results: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Tasks that have a quality, and have begun."""
    return (summary for summary in results["summaries"] if summary["title"] != Speed.name and summary["rows"])


def _panel(results: dict[str, Any], summary: dict[str, Any], costs: dict[str, float], *, more_is_better: bool) -> Panel:
    primary = summary["primary"]
    rows = [row for row in summary["rows"] if row["policy"] in costs and primary in row["metrics"]]
    signs = (1 if more_is_better else -1, 1 if summary["higher_is_better"] else -1)
    pairs = [(signs[0] * costs[row["policy"]], signs[1] * row["metrics"][primary]["mean"]) for row in rows]
    points = {
        row["policy"]: _point(row["policy"], costs[row["policy"]], row["metrics"][primary], front)
        for row, front in zip(rows, pareto_front(pairs), strict=True)
    }
    by_size = sorted(rows, key=lambda row: row["used_bytes"])
    series_of = {entry["label"]: entry["series"] for entry in results["configuration"]["lineup"]}
    # In the order of the contenders, and random eviction last: pictures of all tasks have the same colours.
    names = sorted(dict.fromkeys(series_of.values()), key=lambda name: name == RANDOM)
    series = {name: [points[row["policy"]] for row in by_size if series_of[row["policy"]] == name] for name in names}
    (full,) = series.pop(FULL) or (None,)
    title = f"{summary['title']}, {QUERIES[summary['query']]}".rstrip(", ")
    return Panel(title, primary, summary["higher_is_better"], series, full)


def _point(label: str, cost: float, estimate: dict[str, Any], front: bool) -> Point:
    return Point(label, cost, estimate["mean"], estimate["low"], estimate["high"], front)
