"""Summary: units -> one row per task and policy: means with intervals, sizes, times, and whether random is beaten."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from headwise.eval.lineup import Entry
from headwise.eval.record import Unit
from headwise.eval.statistics import estimate
from headwise.eval.task import Task

# Plain means over the items.
_COSTS = ("kept_ratio", "used_bytes", "full_bytes", "prefill_seconds", "compress_seconds")


def summarise(tasks: Sequence[Task], lineup: Sequence[Entry], units: Sequence[Unit], seed: int) -> list[dict[str, Any]]:
    """One summary per task, with a row for every entry of the lineup that has units.

    Args:
        seed: of the bootstrap.

    Returns:
        plain values; in a row `over_random` is the primary metric less that of random eviction at the same size, item
        by item, and None where the two have no item in common.
    """
    return [_summarise(task, lineup, [unit for unit in units if unit.task == task.label], seed) for task in tasks]


def _summarise(task: Task, lineup: Sequence[Entry], units: Sequence[Unit], seed: int) -> dict[str, Any]:
    by_entry = {entry.label: [unit for unit in units if unit.policy == entry.label] for entry in lineup}
    twins = {entry.twin_of: by_entry[entry.label] for entry in lineup if entry.twin_of is not None}
    return {
        "task": task.label,
        "title": task.title,
        "query": task.query,
        "primary": task.primary,
        "higher_is_better": task.higher_is_better,
        "rows": [
            _row(entry, by_entry[entry.label], twins.get(entry.label, []), task.primary, seed)
            for entry in lineup
            if by_entry[entry.label]
        ],
    }


def _row(entry: Entry, units: Sequence[Unit], twins: Sequence[Unit], primary: str, seed: int) -> dict[str, Any]:
    # A metric may be missing from some items, such as a task metric where an item has no answer.
    names = dict.fromkeys(name for unit in units for name in unit.outcome.metrics)
    metrics = {name: [u.outcome.metrics[name] for u in units if name in u.outcome.metrics] for name in names}
    theirs = {unit.item: unit.outcome.metrics[primary] for unit in twins}
    gains = [unit.outcome.metrics[primary] - theirs[unit.item] for unit in units if unit.item in theirs]
    costs = {name: sum(getattr(unit.outcome, name) for unit in units) / len(units) for name in _COSTS}
    return {
        "policy": entry.label,
        "twin_of": entry.twin_of,
        "items": len(units),
        "metrics": {name: asdict(estimate(values, seed)) for name, values in metrics.items()},
        "over_random": asdict(estimate(gains, seed)) if gains else None,
        **costs,
    }
