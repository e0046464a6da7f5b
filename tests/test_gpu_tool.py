"""`tools/gpu.py` on a CPU: every part runs, what goes wrong is told, and nothing is imported that may be missing."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import gpu_parts

pytest.importorskip("triton")

import gpu
from on_gpu import kernels, machine, memory, speed, tokens
from on_gpu.cases import Case, Setting, Wrong
from on_gpu.compare import Pair, compare
from on_gpu.report import anything_bad, record_of, text_of
from on_gpu.runner import CRASHED, CUT_OFF, FAILED, HUNG, NOT_RUN, PASSED, Part, PartResult, run_part
from on_gpu.worker import outcome_of

from headwise.bench import bandwidth
from headwise.kernels.interface import Decoded
from headwise.kernels.triton.backend import KERNELS

TINY = Setting(tiny=True)

# What headwise has extras for, and what its tests need: a bare machine may have none of it.
MISSING = [
    "typer",
    "rich",
    "pytest",
    "_pytest",
    "jaxtyping",
    "beartype",
    "hypothesis",
    "matplotlib",
    "gguf",
    "accelerate",
]
MISSING += ["rapidfuzz", "lm_eval", "ray", "peft", "xdist", "vllm", "datasets"]


def all_passed(cases):
    found = {case.name: outcome_of(case) for case in cases}
    assert {name: one for name, one in found.items() if one["outcome"] != PASSED} == {}
    return {name: one["figures"] for name, one in found.items()}


# Every part.


def test_parts_are_there_and_end_in_eight_minutes():
    for part in gpu.PARTS:
        module, name = part.cases.split(":")
        cases = getattr(importlib.import_module(module), name)(TINY)
        names = [case.name for case in cases]
        assert len(set(names)) == len(names) > 0
        assert part.case_limit <= part.limit
    assert sum(part.limit for part in gpu.PARTS[:-1]) < gpu.SECONDS / 1.5
    assert gpu.SECONDS <= 480 - 10


def kinds_of(names):
    return {name.split(",")[0].split(" ")[0] for name in names}


def test_kernels():
    """Some of all cases: all of them run where the tool itself is tried, and in the tests of the kernels."""
    every = kernels.cases(TINY)
    assert kinds_of(case.name for case in every[:8]) == kinds_of(case.name for case in every)
    found = all_passed(every[:8] + every[8::10])
    assert 0 < max(figure["largest_error"] for figures in found.values() for figure in figures.values()) < 0.05


class Mistaken:
    """Kernels with one small mistake each; every one must be found by some case."""

    @staticmethod
    def output(request):
        found = KERNELS.ragged_decode(request)
        return replace(found, output=found.output * 1.05)

    @staticmethod
    def lse(request):
        found = KERNELS.ragged_decode(request)
        return replace(found, lse=found.lse + 1e-3)

    @staticmethod
    def not_a_number(request):
        found = KERNELS.ragged_decode(request)
        found.output[0, 0, 0, 0, 0] = float("nan")
        return found

    @staticmethod
    def no_mass(request):
        found = KERNELS.ragged_decode(request)
        return Decoded(found.output, found.lse, None, None)


@pytest.mark.parametrize("mistake", ["output", "lse", "not_a_number", "no_mass"])
def test_a_decode_that_is_wrong_is_found(mistake):
    wrong = replace(KERNELS, ragged_decode=getattr(Mistaken, mistake))
    found = outcome_of(kernels.cases(TINY, wrong)[0])
    assert found["outcome"] == FAILED
    assert found["error"]


def test_other_kernels_that_are_wrong_are_found():
    def append(request):
        KERNELS.append(request)
        request.pages[0].columns[request.pages[0].table[0, 0, 0]] += 1

    def column_mass(request):
        mass, band = KERNELS.column_mass(request)
        return mass * 1.01, band

    def peaks(request):
        output, largest = KERNELS.attention_and_peaks(request)
        return output, largest.roll(1)

    wrong = replace(KERNELS, append=append, column_mass=column_mass, attention_and_peaks=peaks)
    cases = kernels.cases(TINY, wrong)
    for kind in ("captured", "append", "column", "peaks"):
        case = next(case for case in cases if case.name.startswith(kind))
        assert outcome_of(case)["outcome"] == FAILED, case.name


def test_what_is_exact_must_be_equal():
    one = torch.tensor([1.0, -torch.inf, 3.0])
    assert compare([Pair("same", one, one.clone())])["same"]["largest_error"] == 0
    with pytest.raises(Wrong, match=r"1 of 3 differ, the first at \[2\]: 3, not 3\.5"):
        compare([Pair("other", one, torch.tensor([1.0, -torch.inf, 3.5]), atol=0.4)])
    with pytest.raises(Wrong, match="float32"):
        compare([Pair("dtype", one, one.half())])


def test_tokens():
    cases = tokens.cases(TINY)
    chosen = [case for case in cases if "padded" in case.name or "h2o, int4, captured" in case.name]
    figures = all_passed(chosen[::2][:2])
    assert {one["ids_that_differ"] for one in figures.values()} == {0}
    assert max(one["largest_logit_error"] for one in figures.values()) < 1e-3


def test_tokens_that_are_wrong_are_found(monkeypatch):
    monkeypatch.setattr("headwise.kernels.triton.backend.KERNELS", replace(KERNELS, ragged_decode=Mistaken.output))
    assert outcome_of(tokens.cases(TINY)[0])["outcome"] == FAILED


def test_memory(monkeypatch):
    cases = memory.cases(TINY)
    figures = all_passed([cases[0], cases[2], cases[-1]])
    full, quarter, _ = figures.values()
    assert full["allocator_bytes"] == full["reported_bytes"] > 2 * quarter["reported_bytes"]
    # A report that leaves something out.
    monkeypatch.setattr(memory, "_PER_LAYER", 0)
    monkeypatch.setattr("headwise.report.layer_report.storage_bytes", lambda tensors: 1)
    found = outcome_of(cases[0])
    assert found["outcome"] == FAILED and found["figures"]["reported_bytes"] < full["reported_bytes"]


@pytest.fixture
def brief(monkeypatch):
    """Bandwidth is measured of next to nothing, and once."""
    monkeypatch.setattr(bandwidth, "_BUFFER_BYTES", 2**16)
    monkeypatch.setattr(bandwidth, "_KERNEL_REPEATS", 1)


@pytest.mark.usefixtures("brief")
def test_speed():
    told = []
    cases = speed.cases(replace(TINY, tell=told.append))
    found = all_passed(cases[2:])
    verdicts = {verdict["name"] for figures in found.values() for verdict in figures.get("targets", [])}
    targets = all_passed(machine.cases(TINY)[1:2])["targets"]["targets"]
    # Those of the decode kernel are not judged where all that it reads is in a cache.
    assert verdicts == {one["name"] for one in targets if not one["name"].startswith("decode kernel")}
    assert len(verdicts) == 5
    assert {one["verdict"] for one in targets} == {"not run"}
    assert told[-1]["result"][0]["candidates"]
    assert next(iter(found.values()))["share_of_copy"] > 0


@pytest.mark.usefixtures("brief")
def test_a_contender_that_fails_is_told_and_costs_no_other(monkeypatch):
    def fails(*_, **__):
        raise ZeroDivisionError("by hand")

    monkeypatch.setattr("headwise.hosts.transformers.graph.DecodeGraph", fails)
    found = outcome_of(speed.cases(TINY)[4])
    assert found["outcome"] == FAILED and "graph: ZeroDivisionError: by hand" in found["error"]
    ran = {one["name"]: one["failure"] for one in found["figures"]["result"][0]["candidates"]}
    assert ran["keep 25%"] is None and ran["stock"] is None


# The runner.


@pytest.fixture(scope="module")
def troubled(tmp_path_factory):
    """Two parts that go wrong, side by side as it is waiting that takes the time, and what was said."""
    said = []
    folder = tmp_path_factory.mktemp("troubled")
    return run_part(Part("troubled", "gpu_parts:troubled", 60, 2.0), folder, tiny=True, say=said.append), said


def test_a_crash_and_a_hang_cost_one_case_each(troubled):
    result, said = troubled
    outcomes = {case["name"]: case["outcome"] for case in result.cases}
    assert outcomes == {
        **dict.fromkeys(("first", "second", "last"), PASSED),
        "crash": CRASHED,
        "hang": HUNG,
        "wrong": FAILED,
        "error": FAILED,
    }
    by_name = {case["name"]: case for case in result.cases}
    assert by_name["first"]["figures"] == {"answer": 42}
    assert "SIGSEGV" in by_name["crash"]["error"] and "about to crash" in by_name["crash"]["error"]
    assert by_name["wrong"]["figures"] == {"largest_error": 1.0} and by_name["wrong"]["error"] == "off by one"
    assert by_name["error"]["error"] == "ValueError: no such thing" and by_name["error"]["traceback"]
    assert "troubled: hang: hung" in said
    text = text_of(record_of([result], 1.0, tiny=True))
    assert "3 passed, 1 crashed, 1 hung, 2 failed" in text
    for line in ("CRASHED crash: ", "HUNG hang: ", "FAILED wrong: off by one", "FAILED error: ValueError"):
        assert line in text
    assert anything_bad([result])


def test_a_limit_ends_a_part_and_a_part_that_cannot_begin_is_told(tmp_path):
    """Through the whole tool: both files are there, and the exit status says that something is wrong."""
    parts = [
        Part("slow", "gpu_parts:slow", limit=4, case_limit=50),
        Part("broken", "gpu_parts:broken", limit=30, case_limit=5),
    ]
    assert gpu.run(parts, tmp_path / "out", 60, tiny=True) == 1
    record = json.loads((tmp_path / "out" / "gpu.json").read_text())
    slow, broken = record["parts"]
    assert [case["outcome"] for case in slow["cases"]] == [PASSED, CUT_OFF, NOT_RUN]
    assert 3.9 < slow["seconds"] < 10
    assert broken["cases"] == [] and "cannot even begin" in broken["trouble"][0]
    # What was found half-way counts.
    text = (tmp_path / "out" / "gpu.txt").read_text()
    assert "met      half-way: >= 1, measured 2" in text
    assert "cut off: endless" in text and "not run: never" in text
    assert not anything_bad([PartResult("slow", 4, cases=slow["cases"])])


def test_a_device_that_never_comes_back_ends_the_part(tmp_path, monkeypatch):
    monkeypatch.setenv("GPU_PARTS_MARK", str(tmp_path / "mark"))
    result = run_part(Part("dying", "gpu_parts:dies_at_the_start", 60, 30), tmp_path, tiny=True, say=lambda _: None)
    assert [case["outcome"] for case in result.cases] == [CRASHED, NOT_RUN]
    assert "no device any more" in result.trouble[0]


def test_no_time_left_is_reported_too(tmp_path):
    assert gpu.run([Part("late", "gpu_parts:troubled", 10, 5)], tmp_path, 0.0, tiny=True) == 0
    assert "nothing ran" in (tmp_path / "gpu.txt").read_text()


def test_the_text_says_met_missed_and_not_run():
    verdicts = [
        {"name": name, "target": ">= 2", "measured": None, "verdict": verdict, "shown": shown}
        for name, verdict, shown in (("a", "not run", ""), ("b", "not run", ""), ("c", "not run", ""))
    ]
    late = [verdicts[0] | {"verdict": "met", "shown": "3"}, verdicts[1] | {"verdict": "missed", "shown": "1"}]
    results = [
        PartResult("machine", 1, cases=[{"name": "targets", "outcome": PASSED, "figures": {"targets": verdicts}}]),
        PartResult("speed", 1, cases=[{"name": "one", "outcome": PASSED, "figures": {"targets": late}}]),
    ]
    text = text_of(record_of(results, 1.0, tiny=False))
    for line in ("met      a: >= 2, measured 3", "missed   b: >= 2, measured 1", "not run  c: >= 2\n"):
        assert line in text
    assert not anything_bad(results)


def test_shares_come_back_in_the_order_of_the_cases(tmp_path, monkeypatch):
    part = Part("shared", "gpu_parts:few", 60, 30, workers=2)
    result = run_part(part, tmp_path, tiny=True, say=lambda _: None)
    assert [case["name"] for case in result.cases] == ["a", "b", "c"]
    assert {case["outcome"] for case in result.cases} == {PASSED}


# A bare machine.


def test_nothing_is_imported_that_may_be_missing(tmp_path):
    """The whole tool, in Pythons that have only torch, triton and transformers, and what these need."""
    program = f"import sys\nfor name in {MISSING!r}:\n    sys.modules[name] = None\n"
    (tmp_path / "sitecustomize.py").write_text(program)
    code = "import gpu, sys, pathlib; from on_gpu.runner import Part; "
    code += (
        "sys.exit(gpu.run([Part('all', 'gpu_parts:some_of_all', 110, 60)], pathlib.Path(sys.argv[1]), 110, tiny=True))"
    )
    folders = [tmp_path, *(gpu_parts.ROOT / name for name in ("src", "tools"))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))}
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert record["parts"][0]["outcomes"] == {PASSED: 8}
    assert {"torch", "triton", "transformers", "python", "headwise"} <= set(record["versions"])
    assert record["machine"]["cores"]
    assert [one["verdict"] for one in record["targets"]]
    # The names above are what keeps them out.
    blocked = subprocess.run([sys.executable, "-c", "import typer"], env=environment, capture_output=True, text=True)
    assert "ModuleNotFoundError" in blocked.stderr


def test_the_tool_says_what_it_takes():
    done = subprocess.run(
        [sys.executable, str(gpu_parts.ROOT / "tools" / "gpu.py"), "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "--tiny" in done.stdout
    assert Path(gpu.__file__).name == "gpu.py"
    assert Case("a", dict).run() == {}
