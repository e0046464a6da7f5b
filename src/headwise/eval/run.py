"""Run: tasks, contenders and a model -> every item under every policy, written down as it is finished, and a summary.

Item by item, so that what the policies are compared with is made once per item; every policy's size is known before
random eviction has to have the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headwise.errors import ConfigurationError
from headwise.eval.contenders import Contender
from headwise.eval.executor import Executor, Job, Prepared
from headwise.eval.run_folder import RunFolder, Unit, write_unit
from headwise.eval.summary import summarise
from headwise.eval.task import Item, Task

Tell = Callable[[int, int, str], None]


@dataclass
class Results:
    """What has come of a run.

    Attributes:
        header: what the run is.
        units: finished ones, in the order of tasks, items and contenders.
        summaries: one per task.
        interrupted: whether units are missing.
    """

    header: dict[str, Any]
    units: list[Unit]
    summaries: list[dict[str, Any]]
    interrupted: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values, all that tables need."""
        units = [unit.to_dict() for unit in self.units]
        return {**self.header, "interrupted": self.interrupted, "summaries": self.summaries, "units": units}


def run(
    tasks: Sequence[Task],
    contenders: Sequence[Contender],
    executor: Executor,
    out: Path,
    *,
    seed: int = 0,
    command: str | None = None,
    resume: bool = False,
    tell: Tell = lambda done, total, what: None,
) -> Results:
    """Measure everything that is not measured yet. An interruption (Ctrl-C) ends it early, with what there is.

    Args:
        tasks: with different labels.
        contenders: from `make_contenders`.
        executor: where the model is.
        out: folder for the records.
        seed: of the bootstrap.
        command: line that asks for it, for the record.
        resume: continue the run in that folder, if it holds one.
        tell: takes the number of finished units, of all units, and a word on the last.

    Raises:
        ConfigurationError: when the folder holds a run and is not to be resumed, or two tasks are the same.
        MismatchError: when the run to be resumed is another one.
        InputError: when texts or files do not suffice.
    """
    labels = [task.label for task in tasks]
    if len(set(labels)) < len(labels):
        raise ConfigurationError(f"two tasks have the same name; the tasks are: {'; '.join(labels)}")
    run_folder = RunFolder(out, resume)
    prepared = executor.prepare(tasks)
    header, units = run_folder.begin({"command": command} | _header(tasks, contenders, executor, prepared, seed))
    total = sum(map(len, prepared.items.values())) * len(contenders)
    tell(len(units), total, "resumed" if resume else "started")
    jobs = list(_jobs(tasks, contenders, prepared, units))
    interrupted = False
    try:
        with run_folder.writer() as file:
            for unit in executor.measure(jobs):
                write_unit(file, unit)
                units.append(unit)
                tell(len(units), total, f"{unit.task}: {unit.policy}")
    except KeyboardInterrupt:
        interrupted = True
    units = _in_order(units, tasks, contenders, prepared)
    results = Results(header, units, summarise(tasks, contenders, units, seed), interrupted)
    run_folder.finish(results.to_dict())
    return results


def _jobs(
    tasks: Sequence[Task], contenders: Sequence[Contender], prepared: Prepared, finished: Iterable[Unit]
) -> Iterator[Job]:
    done = {unit.key: unit.measured.kept_ratio for unit in finished}
    for task in tasks:
        for item in prepared.items[task.label]:
            keys = {each.label: (task.label, item.key, each.label) for each in contenders}
            kept = {label: done[key] for label, key in keys.items() if key in done}
            left = tuple(each for each in contenders if each.label not in kept)
            if left:
                yield Job(task, item, left, kept)


def _in_order(
    units: Sequence[Unit], tasks: Sequence[Task], contenders: Sequence[Contender], prepared: Prepared
) -> list[Unit]:
    found = {unit.key: unit for unit in units}
    keys = ((t.label, item.key, e.label) for t in tasks for item in prepared.items[t.label] for e in contenders)
    return [found[key] for key in keys if key in found]


def _header(
    tasks: Sequence[Task], contenders: Sequence[Contender], executor: Executor, prepared: Prepared, seed: int
) -> dict[str, Any]:
    return {
        "configuration": {
            "tasks": [_describe_task(task) for task in tasks],
            "lineup": [contender.describe() for contender in contenders],
            "source": executor.describe(),
            "seed": seed,
        },
        "inputs": {label: _describe_inputs(items) for label, items in prepared.items.items()},
        "model": prepared.model,
        "machine": prepared.machine,
        "versions": prepared.versions,
    }


def _describe_task(task: Task) -> dict[str, Any]:
    """Label and options, as plain values."""
    return {"label": task.label, "name": task.name, "options": _plain(asdict(task))}  # type: ignore[call-overload]  # tasks are dataclasses


def _describe_inputs(items: Sequence[Item]) -> dict[str, Any]:
    """How many items there are, and a hash of all of their data."""
    lines = "\n".join(f"{item.key} {item.digest}" for item in items)
    return {"items": len(items), "sha256": hashlib.sha256(lines.encode()).hexdigest()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value
