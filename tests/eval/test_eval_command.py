"""`headwise eval`: every kind of evaluation on a tiny model."""

from __future__ import annotations

import json
import re

import pytest

import commands
from commands import assert_one_line
from headwise.eval.fidelity import Fidelity
from headwise.eval.run_folder import RESULTS
from headwise.eval.setting import describe_setting


@pytest.fixture
def call(folder, short_manual, tmp_path, monkeypatch):
    """A kind of evaluation, whose records go to a folder of that name."""
    monkeypatch.setenv("HEADWISE_MODEL", str(folder))
    return lambda kind, *arguments, to="out": commands.call("eval", kind, "--out", tmp_path / to, *arguments)


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
    assert_one_line(call(kind, *arguments), says)
