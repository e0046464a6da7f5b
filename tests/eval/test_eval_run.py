"""Runs of evaluations: what is written down, resumed and interrupted; on a task that needs no time."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from evaluating import (
    CONTENDERS,
    LABELS,
    Indifferent,
    Toy,
    lines,
)

import chatty
from headwise.errors import ConfigurationError, InputError, MismatchError
from headwise.eval.contenders import PolicyContender
from headwise.eval.executor import LocalExecutor
from headwise.eval.model_source import ModelSource
from headwise.eval.run import run
from headwise.eval.run_folder import RESULTS, RUN, UNITS
from headwise.eval.task import Item, Subject
from headwise.policies import SnapKV


@pytest.fixture(autouse=True)
def log():
    Toy.log.clear()
    Toy.stop_at = None
    return Toy.log


@pytest.fixture(scope="module")
def subject():
    return Subject(chatty.model(1024), chatty.tokenizer())


@pytest.fixture
def toy_run(subject, tmp_path):
    def call(task=None, contenders=CONTENDERS, **more):
        return run([task or Toy()], contenders, LocalExecutor(ModelSource(), subject), tmp_path / "out", **more)

    return call


def test_item_by_item_with_one_reference_and_random_of_the_same_size(toy_run, log):
    toy_run()
    draw = "Random(keep={}, seed=3)"
    policies = ["Full()", "Window(size=4)", draw.format(0.5), "Window(size=2)", draw.format(0.25)]
    assert log == [(what, item) for item in "012" for what in ("reference", *policies)]


def test_units_are_in_the_folder_as_soon_as_they_are_finished(toy_run, tmp_path):
    seen = []

    def tell(done, total, what):
        assert total == 15
        seen.append(what)
        assert len(lines(tmp_path / "out")) == done if done else not (tmp_path / "out" / UNITS).exists()

    toy_run(tell=tell)
    assert seen == ["started", *(f"toy: {label}" for _ in "012" for label in LABELS)]


def test_summary_has_means_intervals_costs_and_the_difference_to_random(toy_run, tmp_path):
    results = toy_run()
    (summary,) = results.summaries
    rows = {row["policy"]: row for row in summary["rows"]}
    assert list(rows) == LABELS
    half = rows["window:size=4"]
    assert half["metrics"]["score"]["mean"] == pytest.approx((1 + 2 + 4) / 3 / 2 + 0.5)
    assert half["over_random"] == {"mean": 0.5, "low": 0.5, "high": 0.5}
    assert (half["items"], half["kept_ratio"], half["used_bytes"], half["compress_seconds"]) == (3, 0.5, 50, 1)
    assert rows["full"]["over_random"] is rows["random, size of window:size=4"]["over_random"] is None
    assert rows["random, size of window:size=4"]["kept_ratio"] == 0.5
    assert json.loads((tmp_path / "out" / RESULTS).read_text()) == json.loads(json.dumps(results.to_dict()))


def test_header_says_what_the_run_is(toy_run, tmp_path):
    toy_run()
    header = json.loads((tmp_path / "out" / RUN).read_text())
    assert set(header) == {"command", "configuration", "inputs", "model", "machine", "versions"}
    assert header["configuration"]["tasks"] == [
        {"label": "toy", "name": "toy", "options": {"values": [1, 2, 4], "extra": ""}}
    ]
    assert [entry["label"] for entry in header["configuration"]["lineup"]] == LABELS
    assert header["configuration"]["seed"] == 0
    assert header["configuration"]["source"]["evict_every"] == 16
    assert header["inputs"]["toy"]["items"] == 3
    assert len(header["inputs"]["toy"]["sha256"]) == 64
    assert header["model"]["layers"] == chatty.LAYERS
    assert {"torch", "transformers", "headwise"} <= set(header["versions"])


@pytest.mark.parametrize("finished", [0, 1, 2, 7, 14])
def test_what_is_finished_survives_an_interruption_and_is_not_done_again(toy_run, tmp_path, log, finished):
    whole = toy_run().to_dict()
    for file in (tmp_path / "out").iterdir():
        file.unlink()
    log.clear()
    # Every item has a reference before its five units.
    Toy.stop_at = finished + 1 + finished // 5
    stopped = toy_run()
    assert stopped.interrupted
    assert len(stopped.units) == len(lines(tmp_path / "out")) == finished
    assert json.loads((tmp_path / "out" / RESULTS).read_text())["interrupted"]
    log.clear()
    Toy.stop_at = None
    resumed = toy_run(resume=True)
    assert len([what for what, _ in log if what != "reference"]) == 15 - finished
    assert resumed.to_dict() == whole
    log.clear()
    assert toy_run(resume=True).to_dict() == whole
    assert log == []


def test_a_line_that_was_broken_off_is_done_again(toy_run, tmp_path, log):
    whole = toy_run().to_dict()
    path = tmp_path / "out" / UNITS
    data = path.read_bytes()
    path.write_bytes(data[:-9])
    log.clear()
    assert toy_run(resume=True).to_dict() == whole
    assert log == [("reference", "2"), ("Random(keep=0.25, seed=3)", "2")]
    assert path.read_bytes() == data
    path.write_bytes(data.replace(b'"score"', b'"sc', 1))
    with pytest.raises(InputError, match="line 1 of"):
        toy_run(resume=True)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"task": Toy(extra="x")}, "configuration differ"),
        ({"task": Toy(values=(1, 2, 5))}, "configuration and inputs differ"),
        ({"contenders": CONTENDERS[:1]}, "configuration differ"),
        ({"seed": 1}, "configuration differ"),
    ],
)
def test_another_run_is_not_continued(toy_run, change, says):
    toy_run()
    with pytest.raises(MismatchError, match=says):
        toy_run(**change, resume=True)


def test_inputs_that_changed_are_noticed(toy_run, monkeypatch):
    toy_run()
    monkeypatch.setattr(Toy, "items", lambda self, tokenizer: [Item("0", {"value": 9})])
    with pytest.raises(MismatchError, match="inputs differ"):
        toy_run(resume=True)


def test_a_run_is_not_written_over(toy_run, tmp_path):
    toy_run()
    with pytest.raises(ConfigurationError, match="holds a run; continue it with --resume"):
        toy_run()
    (tmp_path / "out" / RUN).write_text("{")
    with pytest.raises(InputError, match="does not describe a run"):
        toy_run(resume=True)


def test_tasks_must_differ(subject, tmp_path):
    with pytest.raises(ConfigurationError, match="two tasks have the same name"):
        run([Toy(), Toy(extra="x")], CONTENDERS, LocalExecutor(ModelSource(), subject), tmp_path)


def test_a_file_in_the_way(toy_run, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises((InputError, ConfigurationError), match="cannot make the folder"):
        toy_run()


def test_bytes_are_turned_into_tokens_by_the_width_of_the_rows(subject, tmp_path, log):
    """A row's column takes 4 bytes: of 4 heads, 4 x 68 or 4 x 36 bytes a token."""
    contender = PolicyContender("snapkv at 8KiB", "snapkv", SnapKV(keep=1), budget="8KiB")
    for dtype in (None, torch.float32, torch.float16):
        executor = LocalExecutor(ModelSource(), replace(subject, options={"cache_dtype": dtype}))
        run([Indifferent(values=(1,))], (contender,), executor, tmp_path / str(dtype))
    measured = [policy for policy, _ in log if policy != "reference"]
    assert measured == [str(SnapKV(keep=tokens)) for tokens in (30, 30, 56)]
