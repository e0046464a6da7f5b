"""Runs whose jobs are done elsewhere, by way of Ray or something in its place."""

from __future__ import annotations

import json
import pickle
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from evaluating import (
    CONTENDERS,
    MANUAL,
    lines,
)

from headwise.errors import ConfigurationError, InputError
from headwise.eval.executor import LocalExecutor
from headwise.eval.fidelity import Fidelity
from headwise.eval.model_source import ModelSource
from headwise.eval.ray_executor import RayExecutor
from headwise.eval.run import run
from headwise.eval.run_folder import UNITS

pytestmark = pytest.mark.usefixtures("short_manual")


def comparable(results):
    """All but the times, which no two runs share."""
    found = json.loads(json.dumps(results))
    for row in [*found["units"], *(row for summary in found["summaries"] for row in summary["rows"])]:
        for name in ("prefill_seconds", "compress_seconds"):
            del row[name]
    return found


class Elsewhere:
    """Ray's part in it, without the other processes: everything travels as bytes, and the last job is done first."""

    class exceptions:
        class RayTaskError(Exception):
            def __init__(self, cause):
                self.cause = cause

    def __init__(self):
        self.needs, self.cancelled, self.connected = [], [], []

    def is_initialized(self):
        return bool(self.connected)

    def init(self, **options):
        self.connected.append(options)

    def remote(self, **needs):
        self.needs.append(needs)
        return lambda function: SimpleNamespace(remote=lambda *given: (function, pickle.dumps(given)))

    def get(self, task):
        function, given = task
        try:
            return pickle.loads(pickle.dumps(function(*pickle.loads(given))))
        except InputError as error:
            raise self.exceptions.RayTaskError(error) from None

    def wait(self, tasks):
        return tasks[-1:], tasks[:-1]

    def cancel(self, task):
        self.cancelled.append(task)


@pytest.fixture
def elsewhere(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", found := Elsewhere())
    return found


TASK = Fidelity(context=40, steps=3, passages=3)


def test_jobs_done_elsewhere_give_the_same_results(elsewhere, folder, tmp_path):
    source = ModelSource(str(folder))
    here = run([TASK], CONTENDERS, LocalExecutor(source), tmp_path / "here")
    there = run([TASK], CONTENDERS, RayExecutor(source, "auto", cpus=2, gpus=0.5), tmp_path / "there")
    assert comparable(there.to_dict()) == comparable(here.to_dict())
    # One after the other they were written as they came.
    assert [unit["item"] for unit in lines(tmp_path / "there")[:: len(CONTENDERS)]] == ["00002", "00001", "00000"]
    assert elsewhere.connected[0]["address"] == "auto"
    assert elsewhere.needs == [{"num_cpus": 2, "num_gpus": 0.5}] * 2
    assert not elsewhere.cancelled
    # A run begun elsewhere can be finished here.
    data = (tmp_path / "there" / UNITS).read_bytes()
    (tmp_path / "there" / UNITS).write_bytes(data[: len(data) // 2])
    resumed = run([TASK], CONTENDERS, LocalExecutor(source), tmp_path / "there", resume=True)
    assert comparable(resumed.to_dict()) == comparable(here.to_dict())


def test_what_goes_wrong_elsewhere_is_raised_here(elsewhere, folder, tmp_path):
    with pytest.raises(InputError, match="no file"):
        run(
            [Fidelity(files=(tmp_path / "none.txt",))],
            CONTENDERS,
            RayExecutor(ModelSource(str(folder))),
            tmp_path / "out",
        )


def test_an_interruption_calls_off_what_waits_elsewhere(elsewhere, folder, tmp_path):

    def tell(done, total, what):
        if done:
            raise KeyboardInterrupt

    results = run([TASK], CONTENDERS, RayExecutor(ModelSource(str(folder))), tmp_path / "out", tell=tell)
    assert results.interrupted
    assert (len(results.units), len(elsewhere.cancelled)) == (1, 2)


def test_ray_itself_gives_the_same_results(folder, tmp_path):
    ray = pytest.importorskip("ray")
    (tmp_path / "text.txt").write_text(MANUAL, encoding="utf-8")
    task, source = replace(TASK, files=(tmp_path / "text.txt",)), ModelSource(str(folder))
    here = run([task], CONTENDERS, LocalExecutor(source), tmp_path / "here")
    try:
        there = run([task], CONTENDERS, RayExecutor(source), tmp_path / "there")
    finally:
        ray.shutdown()
    assert comparable(there.to_dict()) == comparable(here.to_dict())


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'headwise\[ray\]'"):
        RayExecutor(ModelSource())
