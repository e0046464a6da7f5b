"""Ray executor: jobs -> their units, from the processes of this machine or a cluster, by way of Ray."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from headwise.errors import ConfigurationError
from headwise.eval.executor import Executor, Job, Prepared, measure, prepare
from headwise.eval.model_source import ModelSource
from headwise.eval.run_folder import Unit
from headwise.eval.task import Subject, Task


class RayExecutor(Executor):
    """Every item with all its policies is a task of Ray; a process loads the model once.

    Args:
        source: what loads the model, in every process.
        address: of the cluster's head, such as "ray://head:10001" or "auto"; None for a Ray of this machine.
        cpus, gpus: of an item; as many items run at once as there is room for.

    Raises:
        ConfigurationError: when Ray is not installed.
    """

    def __init__(self, source: ModelSource, address: str | None = None, cpus: int = 1, gpus: float = 0.0) -> None:
        try:
            self._ray: Any = importlib.import_module("ray")
        except ImportError as error:
            raise ConfigurationError(f"--ray needs Ray ({error}): pip install 'headwise[ray]'") from error
        self._source = source
        self._address = address
        self._needs = {"num_cpus": cpus, "num_gpus": gpus}

    def describe(self) -> dict[str, Any]:
        """The source."""
        return self._source.describe()

    def prepare(self, tasks: Sequence[Task]) -> Prepared:
        """On one of the processes: this one never loads the model."""
        self._connect()
        prepared: Prepared = self._result(self._remote(_prepare).remote(self._source, tasks))
        return prepared

    def measure(self, jobs: Sequence[Job]) -> Iterator[Unit]:
        """The units of an item at a time, as items are finished."""
        self._connect()
        remote = self._remote(_measure)
        waiting = [remote.remote(self._source, job) for job in jobs]
        try:
            while waiting:
                done, waiting = self._ray.wait(waiting)
                yield from self._result(done[0])
        finally:
            for task in waiting:
                self._ray.cancel(task)

    def _connect(self) -> None:
        if not self._ray.is_initialized():
            self._ray.init(address=self._address, log_to_driver=False)

    def _remote(self, function: Any) -> Any:
        return self._ray.remote(**self._needs)(function)

    def _result(self, task: Any) -> Any:
        """What a task returned; what it raised is raised as it was there."""
        try:
            return self._ray.get(task)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from error


@cache
def _subject(source: ModelSource) -> Subject:
    """The model of this process."""
    return source.load()


def _prepare(source: ModelSource, tasks: Sequence[Task]) -> Prepared:
    return prepare(_subject(source), source.name, tasks)


def _measure(source: ModelSource, job: Job) -> list[Unit]:
    return list(measure(_subject(source), job))
