"""Runs of evaluations: what is written down, resumed, interrupted and shown; on a task that needs no time."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import re
import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

import chatty
from headwise.cli.main import main
from headwise.errors import ConfigurationError, InputError, MismatchError
from headwise.eval.contenders import PolicyContender, make_contenders
from headwise.eval.executor import LocalExecutor
from headwise.eval.fidelity import Fidelity
from headwise.eval.model_source import ModelSource
from headwise.eval.ray_executor import RayExecutor
from headwise.eval.run import run
from headwise.eval.run_folder import RESULTS, RUN, UNITS
from headwise.eval.setting import describe_setting
from headwise.eval.task import Item, Measured, Subject, Task
from headwise.policies import SnapKV

CONTENDERS = make_contenders(["window:size=4", "window:size=2"], seed=3)
LABELS = [contender.label for contender in CONTENDERS]
KEPT = {"full": 1.0, "Window(size=4)": 0.5, "Window(size=2)": 0.25}


@dataclass(frozen=True)
class Toy(Task):
    """Keeps a log of what is asked of it; the metric is the item's number times what is kept."""

    values: tuple[int, ...] = (1, 2, 4)
    extra: str = ""

    name: ClassVar[str] = "toy"
    primary: ClassVar[str] = "score"
    higher_is_better: ClassVar[bool] = True
    log: ClassVar[list] = []
    stop_at: ClassVar[int | None] = None

    def items(self, tokenizer):
        return [Item(str(index), {"value": value}) for index, value in enumerate(self.values)]

    def reference(self, subject, item):
        self.log.append(("reference", item.key))
        return item.data["value"]

    def measure(self, subject, item, kind, reference):
        policy = kind.policy
        if len(self.log) == self.stop_at:
            raise KeyboardInterrupt
        self.log.append((str(policy), item.key))
        kept = KEPT["full"] if str(policy) == "Full()" else KEPT.get(str(policy)) or policy.keep
        metrics = {"score": reference * kept + (0.5 if "Window" in str(policy) else 0)}
        return Measured(metrics, kept, int(100 * kept), 100, 2.0, 1.0, {"said": item.key})


class Indifferent(Toy):
    """Takes any kind of cache with a policy."""

    def measure(self, subject, item, kind, reference):
        self.log.append((str(kind.policy), item.key))
        return Measured({"score": 1.0}, 1.0, 100, 100, 2.0, 1.0)


@pytest.fixture(autouse=True)
def log():
    Toy.log.clear()
    Toy.stop_at = None
    return Toy.log


@pytest.fixture(scope="module")
def subject():
    return Subject(chatty.model(1024), chatty.tokenizer())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return chatty.save(tmp_path_factory.mktemp("model"), 1024)


@pytest.fixture
def toy_run(subject, tmp_path):
    def call(task=None, contenders=CONTENDERS, **more):
        return run([task or Toy()], contenders, LocalExecutor(ModelSource(), subject), tmp_path / "out", **more)

    return call


def lines(path):
    return [json.loads(line) for line in (path / UNITS).read_text().splitlines()]


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


# the command


@dataclass
class Answer:
    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture
def call(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HEADWISE_MODEL", str(folder))
    # The manual is long, and tokenising it takes longer than all the rest.
    monkeypatch.setattr("headwise.measure.texts.manual", lambda: f"{chatty.TEXT} " * 20)

    def command(kind, *arguments, to="out"):
        out, err = io.StringIO(), io.StringIO()
        given = ["eval", kind, "--out", tmp_path / to, *arguments]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as left:
            main([str(argument) for argument in given])
        return Answer(left.value.code, out.getvalue(), err.getvalue())

    return command


SMALL = ("--context", 40, "--steps", 3, "--passages", 2)
POLICIES = ("--policy", "window:size=0.25", "--policy", "streamingllm:window=5,sinks=1")


def test_fidelity_command(call, tmp_path):
    answer = call("fidelity", *SMALL, *POLICIES, "--json")
    assert answer.code == 0, answer.err
    found = answer.json
    assert found == json.loads((tmp_path / "out" / RESULTS).read_text())
    (summary,) = found["summaries"]
    rows = {row["policy"]: row for row in summary["rows"]}
    assert list(rows) == [
        "full",
        "window:size=0.25",
        "random, size of window:size=0.25",
        "streamingllm:window=5,sinks=1",
        "random, size of streamingllm:window=5,sinks=1",
    ]
    assert rows["full"]["metrics"]["kl"]["mean"] < 1e-5
    for name in ("window:size=0.25", "streamingllm:window=5,sinks=1"):
        assert rows[name]["metrics"]["kl"]["mean"] > 1e-3
        assert rows[f"random, size of {name}"]["kept_ratio"] == pytest.approx(rows[name]["kept_ratio"])
    assert rows["window:size=0.25"]["kept_ratio"] == 0.25
    assert answer.err.splitlines()[0] == "0 of 10: started"
    assert answer.err.splitlines()[-1].startswith("10 of 10")


def test_rows_narrower_than_the_model_take_less_and_are_said(call):
    policies = ("--policy", "window:size=0.5", "--policy", "full+int8", "--no-random", "--context", 60)

    def rows(*more, to):
        answer = call("fidelity", *SMALL, *policies, *more, "--json", to=to)
        assert answer.code == 0, answer.err
        (summary,) = answer.json["summaries"]
        return answer.json, {row["policy"]: row for row in summary["rows"]}

    (one, wide), (two, narrow) = rows(to="a"), rows("--cache-dtype", "float16", to="b")
    assert [run["configuration"]["source"]["cache_dtype"] for run in (one, two)] == [None, "float16"]
    assert list(narrow) == ["full", "window:size=0.5", "full+int8"]
    for name, row in wide.items():
        assert narrow[name]["used_bytes"] < row["used_bytes"]
        assert narrow[name]["kept_ratio"] == row["kept_ratio"]
        assert narrow[name]["full_bytes"] == row["full_bytes"]
    # Codes, and exact rows of half the width.
    assert wide["full+int8"]["used_bytes"] < wide["full"]["used_bytes"]
    assert describe_setting(two)["rows"] == "float16"
    assert "rows" not in describe_setting(one)


def test_a_run_does_not_go_on_with_other_rows(call):
    asked = ("fidelity", *SMALL, "--policy", "window:size=0.25", "--no-random")
    assert call(*asked).code == 0
    refused = call(*asked, "--resume", "--cache-dtype", "float16")
    assert refused.code == 2
    assert "cannot be continued" in refused.err


def test_bytes_are_turned_into_tokens_by_the_width_of_the_rows(subject, tmp_path, log):
    """A row's column takes 4 bytes: of 4 heads, 4 x 68 or 4 x 36 bytes a token."""
    contender = PolicyContender("snapkv at 8KiB", "snapkv", SnapKV(keep=1), budget="8KiB")
    for dtype in (None, torch.float32, torch.float16):
        executor = LocalExecutor(ModelSource(), replace(subject, options={"cache_dtype": dtype}))
        run([Indifferent(values=(1,))], (contender,), executor, tmp_path / str(dtype))
    measured = [policy for policy, _ in log if policy != "reference"]
    assert measured == [str(SnapKV(keep=tokens)) for tokens in (30, 30, 56)]


def test_table_of_two_query_modes(call):
    short = ("--context", 200, "--items", 1, "--new-tokens", 2)
    answer = call("recall", *short, "--policy", "window:size=0.5", "--no-random")
    assert answer.code == 0, answer.err
    assert "recall of 1 fact in 4" in answer.out
    columns = answer.out.splitlines()[7]
    assert columns.split() == ["policy", *["agnostic"] * 3, *["aware"] * 3]
    assert answer.out.count("100.0%") == 2
    assert sum(len(re.findall(r"(?:49|50)\.\d%", line)) for line in answer.out.splitlines()) == 2
    assert "…" not in answer.out
    assert "at random" not in answer.out


def test_synthetic_command_has_a_table_per_kind(call):
    kinds = ("--kind", "single-needle,variables", "--query", "aware", "--items", 1, "--context", 400, "--new-tokens", 1)
    found = call("synthetic", *kinds, "--policy", "full", "--json").json
    assert [s["task"] for s in found["summaries"]] == ["synthetic single-needle, aware", "synthetic variables, aware"]
    assert [row["policy"] for row in found["summaries"][0]["rows"]] == ["full"]


def test_seed_reaches_facts_and_random_eviction(call):
    def configuration(*more, to):
        answer = call("recall", "--context", 200, "--items", 1, "--new-tokens", 1, "--json", *more, to=to)
        return answer.json["configuration"], answer.json["inputs"]

    (one, inputs), (two, others) = configuration(to="a"), configuration("--seed", 5, to="b")
    assert two["seed"] == two["tasks"][0]["options"]["seed"] == two["lineup"][2]["seed"] == 5
    assert [entry["label"] for entry in one["lineup"]][1] == "fastgen"
    assert inputs != others


def test_interrupted_command_shows_what_there_is_and_leaves_with_130(call, monkeypatch):
    whole, measure, calls = call("fidelity", *SMALL, *POLICIES, to="whole"), Fidelity.measure, []

    def stop(*given):
        calls.append(given)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return measure(*given)

    monkeypatch.setattr(Fidelity, "measure", stop)
    answer = call("fidelity", *SMALL, *POLICIES)
    assert answer.code == 130
    assert "window:size=0.25" in answer.out
    assert "streamingllm" not in answer.out
    assert "interrupted" in answer.out
    assert "same size at random" not in answer.out.split("window")[0]
    assert "--resume" in answer.err
    resumed = call("fidelity", *SMALL, *POLICIES, "--resume")
    assert (resumed.code, whole.code) == (0, 0)
    assert resumed.err.splitlines()[0] == "3 of 10: resumed"
    refused = call("fidelity", *SMALL, "--resume")
    assert refused.code == 2
    assert "cannot be continued" in refused.err


BAD = {
    "unknown policy": ("recall", ("--policy", "windwo"), "window"),
    "bad first token": ("fidelity", ("--first-token", "x"), "--first-token takes"),
    "bad query": ("recall", ("--query", "x"), "--query must be one of both"),
    "bad kind": ("synthetic", ("--kind", "x"), "kind must be one of"),
    "bad dtype": ("fidelity", ("--dtype", "x"), "unknown dtype"),
    "bad dtype of rows": ("fidelity", ("--cache-dtype", "float8"), "unknown dtype 'float8'"),
    "bad bits": ("fidelity", ("--policy", "full+int3"), "bits are int8, int4, k8v4 or k4v8, got 'int3'"),
    "bad device": ("fidelity", ("--device", "x"), "device"),
    "bad kernel": ("fidelity", ("--kernel", "x"), "kernel"),
    "no text": ("fidelity", ("--text", "none.txt"), "there is no file 'none.txt'"),
    "zero steps": ("fidelity", ("--steps", 0), "steps must be a count"),
}


@pytest.mark.parametrize(("kind", "arguments", "says"), BAD.values(), ids=BAD)
def test_bad_input_takes_one_line(call, kind, arguments, says):
    answer = call(kind, *arguments)
    assert answer.code == 2
    assert answer.out == ""
    assert says in answer.err.splitlines()[-1]
    assert answer.err.splitlines()[-1].startswith("error: ")


# elsewhere


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


def test_jobs_done_elsewhere_give_the_same_results(elsewhere, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("headwise.measure.texts.manual", lambda: f"{chatty.TEXT} " * 20)
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


def test_an_interruption_calls_off_what_waits_elsewhere(elsewhere, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("headwise.measure.texts.manual", lambda: f"{chatty.TEXT} " * 20)

    def tell(done, total, what):
        if done:
            raise KeyboardInterrupt

    results = run([TASK], CONTENDERS, RayExecutor(ModelSource(str(folder))), tmp_path / "out", tell=tell)
    assert results.interrupted
    assert (len(results.units), len(elsewhere.cancelled)) == (1, 2)


def test_ray_itself_gives_the_same_results(folder, tmp_path):
    ray = pytest.importorskip("ray")
    (tmp_path / "text.txt").write_text(f"{chatty.TEXT} " * 20, encoding="utf-8")
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
