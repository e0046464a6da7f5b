"""`headwise policies`, `headwise doctor`, help and version: what there is."""

from __future__ import annotations

import sys

import torch

from headwise.kernels.cpu import backend as cpu


def test_policies(headwise):
    listed = {entry["name"]: entry for entry in headwise("policies", "--json").json}
    assert {"fastgen", "full", "h2o", "random", "streamingllm", "window"} <= set(listed)
    assert all(entry["summary"].endswith(".") for entry in listed.values())
    parameters = {parameter["name"]: parameter for parameter in listed["streamingllm"]["parameters"]}
    assert parameters["window"] == {"name": "window", "default": None, "required": True}
    assert parameters["sinks"] == {"name": "sinks", "default": 4, "required": False}
    shown = headwise("policies")
    assert all(name in shown.out for name in listed)
    assert "window (required)" in shown.out
    assert "sinks=4" in shown.out


def test_doctor(headwise, folder):
    found = headwise("doctor", "--json").json
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["devices"][0]["name"] == "cpu"
    assert found["threads"] == torch.get_num_threads()
    assert found["kernels"]["cpu"]["default"] == "cpu"
    assert found["kernels"]["cpu"]["instructions"] == cpu.vectors()[-1]
    assert found["kernels"]["cpu"]["obstacles"]["cpu"] is None
    assert found["kernels"]["cpu"]["obstacles"]["reference"] is None
    assert found["default_model"] == {"name": str(folder), "chosen_by": "HEADWISE_MODEL", "present": True}
    shown = headwise("doctor")
    assert torch.__version__ in shown.out
    assert f"cpu would run, with {cpu.vectors()[-1]}" in shown.out
    assert str(folder) in shown.out.replace("\n", "")


def test_doctor_says_why_kernels_cannot_run(headwise, monkeypatch):
    monkeypatch.setattr("headwise.kernels.cpu.library.load", lambda: "they were not compiled")
    monkeypatch.delenv("TRITON_INTERPRET")
    found = headwise("doctor", "--json").json["kernels"]["cpu"]
    assert found["default"] == "reference"
    assert found["instructions"] is None
    assert found["obstacles"]["cpu"] == "they were not compiled"
    assert found["obstacles"]["triton"]
    assert "cpu: they were not compiled" in headwise("doctor").out


def test_doctor_sees_that_the_model_or_an_extra_is_missing(headwise, monkeypatch, tmp_path):
    monkeypatch.setenv("HEADWISE_MODEL", str(tmp_path / "nowhere"))
    monkeypatch.setitem(sys.modules["headwise.cli.doctor"]._EXTRAS, "plot", ("no-such-package",))
    found = headwise("doctor", "--json").json
    assert found["default_model"]["present"] is False
    assert found["extras"]["plot"] == {"no-such-package": None}
    assert "no-such-package missing: pip install 'headwise[plot]'" in headwise("doctor").out


def test_help_and_version(headwise):
    assert "generate" in headwise().out
    assert "--compare-full" in headwise("generate", "--help").out
    assert headwise("--version").out.startswith("headwise 0.")
