"""Machine: the device at hand -> what figures depend on beside the code, the compiled library, and all targets."""

from __future__ import annotations

import importlib.util
import subprocess
from functools import partial
from importlib import metadata

import torch

from headwise.bench.record import Record
from headwise.measure.machine import describe_machine, describe_versions
from on_gpu.cases import Case, Figures, Setting
from on_gpu.runner import ROOT


def cases(setting: Setting) -> list[Case]:
    """What there is; then what is to be made."""
    return [
        Case("machine", partial(_machine, setting)),
        Case("targets", partial(_targets, setting)),
        Case("compiled library", partial(_library, setting)),
    ]


def _machine(setting: Setting) -> Figures:
    versions = describe_versions() | {"triton": metadata.version("triton"), "cuda": torch.version.cuda}
    machine = describe_machine(setting.device)
    if setting.device.type == "cuda":
        properties = torch.cuda.get_device_properties(setting.device)
        machine |= {
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "driver": _said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "clocks": _said_by("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader"),
        }
    commit = _said_by("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12")
    return {"machine": machine, "versions": versions, "commit": commit}


def _targets(setting: Setting) -> Figures:
    """Everything that is promised; nothing of it has been run yet."""
    from on_gpu.speed import expected

    record = Record()
    return {"targets": [expectation.judge(record).to_dict() for expectation in expected(setting)]}


def _library(setting: Setting) -> Figures:
    """The kernels for CPUs, where there is a compiler and they are not there yet; nothing here needs them."""
    folder = ROOT / "src/headwise/kernels/cpu/csrc"
    spec = importlib.util.spec_from_file_location("compile_library", folder / "compile.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if module.LIBRARY.exists():
        return {"library": "was there"}
    try:
        module.compile_library()
    except RuntimeError as error:
        return {"library": f"not built: {error}"}
    return {"library": "built"}


def _said_by(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
