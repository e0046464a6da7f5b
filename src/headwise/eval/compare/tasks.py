"""Tasks: names with commas between them, and a workload -> the tasks of a comparison."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from headwise.errors import ConfigurationError
from headwise.eval.fidelity import Fidelity
from headwise.eval.generation import Generation
from headwise.eval.recall import Recall
from headwise.eval.speed import Speed
from headwise.eval.synthetic import KINDS, Synthetic
from headwise.eval.task import Query, Task

_MODES: tuple[Query, ...] = ("agnostic", "aware")
_SYNTHETIC = "synthetic"


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What the tasks have in common.

    Attributes:
        files: texts; Python's manual where there are none.
        context: tokens that are compressed.
        steps: tokens that are then fed, where text is continued.
        items: passages of every text, questions, and prompts at the most.
        new_tokens: of an answer to a question, as for `QuestionTask`.
        rounds: that speed is timed in.
        prompts: file of `generation`.
        seed: of all that is drawn.
        undo_marks: as for `Passages`.
    """

    files: tuple[Path, ...] = ()
    context: int = 2048
    steps: int = 128
    items: int = 8
    new_tokens: int = 24
    rounds: int = 3
    prompts: Path | None = None
    seed: int = 0
    undo_marks: bool = False


def make_tasks(names: Sequence[str], workload: Workload) -> list[Task]:
    """Speed, which every comparison has, and the tasks of those names.

    Args:
        names: `fidelity`, `generation`, `recall`, a kind of synthetic task, or `synthetic` for all of these. What asks
            a question comes in both query modes, or with `-aware` or `-agnostic` behind its name in one.

    Raises:
        ConfigurationError: for another name, or `generation` without a file.
    """
    passages = (workload.files, workload.context, workload.steps, workload.items, None, workload.undo_marks)
    tasks: list[Task] = [Speed(*passages, rounds=workload.rounds)]
    for name in dict.fromkeys(names):
        if name == Fidelity.name:
            tasks.append(Fidelity(*passages))
        elif name == Generation.name:
            if workload.prompts is None:
                raise ConfigurationError("the task 'generation' needs a file of prompts: give one with --prompts")
            tasks.append(Generation(workload.prompts, limit=workload.items))
        else:
            tasks += _asking(name, workload)
    return tasks


def _asking(name: str, workload: Workload) -> Iterator[Task]:
    stem, _, mode = name.rpartition("-")
    stem, modes = (stem, tuple(m for m in _MODES if m == mode)) if mode in _MODES else (name, _MODES)
    if stem not in (Recall.name, _SYNTHETIC, *KINDS):
        known = ", ".join((Fidelity.name, Generation.name, Recall.name, *KINDS, _SYNTHETIC))
        raise ConfigurationError(
            f"unknown task {name!r}; one of {known}; -aware or -agnostic may stand behind the last"
        )
    w = workload
    shared = {"context": w.context, "count": w.items, "new_tokens": w.new_tokens, "seed": w.seed}
    if stem == Recall.name:
        yield from (Recall(query, files=w.files, undo_marks=w.undo_marks, **shared) for query in modes)
    else:
        kinds = tuple(KINDS) if stem == _SYNTHETIC else (stem,)
        yield from (Synthetic(query, kind=kind, **shared) for kind, query in product(kinds, modes))
