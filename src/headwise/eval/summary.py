"""Summary: units -> one row per task and policy: means with intervals, sizes, times, and whether random is beaten."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from headwise.eval.contenders import Contender
from headwise.eval.run_folder import Unit
from headwise.eval.statistics import estimate
from headwise.eval.task import Task

# Plain means over the items.
_COSTS = ("kept_ratio", "used_bytes", "full_bytes", "prefill_seconds", "compress_seconds")


def summarise(
    tasks: Sequence[Task], contenders: Sequence[Contender], units: Sequence[Unit], seed: int
) -> list[dict[str, Any]]:
    """One summary per task, with a row for every contender that has units.

    Args:
        seed: of the bootstrap.

    Returns:
        plain values; in a row `over_random` is the primary metric less that of random eviction at the same size, item
        by item, and None where the two have no item in common.
    """
    return [_summarise(task, contenders, [unit for unit in units if unit.task == task.label], seed) for task in tasks]


def _summarise(task: Task, contenders: Sequence[Contender], units: Sequence[Unit], seed: int) -> dict[str, Any]:
    units_of = {contender.label: [unit for unit in units if unit.policy == contender.label] for contender in contenders}
    at_random = {
        contender.twin_of: units_of[contender.label] for contender in contenders if contender.twin_of is not None
    }
    return {
        "task": task.label,
        "title": task.title,
        "query": task.query,
        "primary": task.primary,
        "higher_is_better": task.higher_is_better,
        "rows": [
            _row(contender, units_of[contender.label], at_random.get(contender.label, []), task.primary, seed)
            for contender in contenders
            if units_of[contender.label]
        ],
    }


def _row(
    contender: Contender, units: Sequence[Unit], at_random: Sequence[Unit], primary: str, seed: int
) -> dict[str, Any]:
    # A metric may be missing from some items, such as a task metric where an item has no answer.
    names = dict.fromkeys(name for unit in units for name in unit.measured.metrics)
    metrics = {name: [u.measured.metrics[name] for u in units if name in u.measured.metrics] for name in names}
    theirs = {unit.item: unit.measured.metrics[primary] for unit in at_random}
    gains = [unit.measured.metrics[primary] - theirs[unit.item] for unit in units if unit.item in theirs]
    costs = {name: sum(getattr(unit.measured, name) for unit in units) / len(units) for name in _COSTS}
    return {
        "policy": contender.label,
        "twin_of": contender.twin_of,
        "items": len(units),
        "metrics": {name: asdict(estimate(values, seed)) for name, values in metrics.items()},
        "over_random": asdict(estimate(gains, seed)) if gains else None,
        **costs,
    }
