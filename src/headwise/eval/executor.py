"""Executor: jobs -> their units, one after the other in this process, or wherever another executor does the work."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from headwise.eval.cache_kinds import CacheKind
from headwise.eval.contenders import Contender
from headwise.eval.model_source import ModelSource
from headwise.eval.run_folder import Unit
from headwise.eval.task import Item, Measured, Subject, Task
from headwise.measure.machine import describe_machine, describe_versions
from headwise.measure.model_info import describe_model


@dataclass(frozen=True)
class Job:
    """One item and the contenders that it has not been measured with yet.

    Attributes:
        kept: share of rows kept of it, by label of the contenders that are finished.
    """

    task: Task
    item: Item
    contenders: tuple[Contender, ...]
    kept: dict[str, float]


@dataclass(frozen=True)
class Prepared:
    """What a model and tasks come to, before anything is measured.

    Attributes:
        items: of every task, by its label.
        model, machine, versions: plain values.
    """

    items: dict[str, list[Item]]
    model: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str | None]


class Executor(ABC):
    """Where jobs are done. Whichever it is, the units are the same; only their order and their times may differ."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What is measured, as plain values; nothing about where."""

    @abstractmethod
    def prepare(self, tasks: Sequence[Task]) -> Prepared:
        """The items of every task, and what they are measured on."""

    @abstractmethod
    def measure(self, jobs: Sequence[Job]) -> Iterator[Unit]:
        """The units of all jobs, as they are finished."""


class LocalExecutor(Executor):
    """Jobs in turn, in this process.

    Args:
        source: loads the model when it is needed.
        subject: the model, where it is loaded already.
    """

    def __init__(self, source: ModelSource, subject: Subject | None = None) -> None:
        self._source = source
        self._subject = subject

    def describe(self) -> dict[str, Any]:
        """The source."""
        return self._source.describe()

    def prepare(self, tasks: Sequence[Task]) -> Prepared:
        """At once."""
        return prepare(self._load(), self._source.name, tasks)

    def measure(self, jobs: Sequence[Job]) -> Iterator[Unit]:
        """Every unit by itself."""
        for job in jobs:
            yield from measure(self._load(), job)

    def _load(self) -> Subject:
        self._subject = self._subject or self._source.load()
        return self._subject


def prepare(subject: Subject, name: str, tasks: Sequence[Task]) -> Prepared:
    """The items of every task, and what they are measured on.

    Args:
        name: of the model.
    """
    items = {task.label: task.items(subject.tokenizer) for task in tasks}
    model = describe_model(subject.model, name) | {"dtype": str(subject.model.dtype)}
    return Prepared(items, model, describe_machine(subject.model.device), describe_versions())


def measure(subject: Subject, job: Job) -> Iterator[Unit]:
    """One item with the contenders of the job, in turn; what they are compared with is made once.

    Nor is the same cache measured twice: what keeps as much has the same random eviction.
    """
    reference, kept = job.task.reference(subject, job.item), dict(job.kept)
    finished: dict[CacheKind, Measured] = {}
    for contender in job.contenders:
        kind = contender.cache_kind(subject.model, kept, subject.options.get("cache_dtype"))
        if kind not in finished:
            finished[kind] = job.task.measure(subject, job.item, kind, reference)
        measured = finished[kind]
        kept[contender.label] = measured.kept_ratio
        yield Unit(job.task.label, job.item.key, contender.label, job.item.digest, measured)
