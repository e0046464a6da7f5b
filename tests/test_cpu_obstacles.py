"""Where the compiled CPU kernels cannot run: what is refused, what is said, and how they are built."""

from __future__ import annotations

import copy
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import headwise
import tiny
from cpu_inputs import CPU
from headwise.hosts.transformers.cache import HeadwiseWarning
from headwise.kernels.backends import check_name, choose, obstacle
from headwise.kernels.cpu import backend as cpu
from headwise.kernels.cpu import library as cpu_library


def test_unknown_kernels_are_refused_with_the_names_there_are():
    with pytest.raises(headwise.ConfigurationError, match="unknown kernel 'fast'; available: auto, cpu, triton, ref"):
        check_name("fast")
    with pytest.raises(headwise.ConfigurationError, match="unknown kernel"):
        headwise.HeadwiseCache(tiny.llama(), headwise.Full(), kernel="fast")


def test_auto_takes_the_compiled_kernels_on_a_cpu():
    assert choose("auto", CPU).name == "cpu"
    assert headwise.HeadwiseCache(tiny.llama(), headwise.Full()).report().kernel == "cpu"


def test_kernels_that_cannot_run_are_never_replaced_in_silence(monkeypatch):
    model = tiny.llama()
    with monkeypatch.context() as patch:
        patch.setattr(cpu_library, "load", lambda: "they were not compiled")
        patch.delenv("TRITON_INTERPRET")
        with pytest.raises(headwise.ConfigurationError, match="'cpu' kernels cannot run on cpu: they were not comp"):
            choose("cpu", CPU)
        with pytest.warns(HeadwiseWarning, match="plain torch kernels.*they were not compiled"):
            cache = headwise.HeadwiseCache(model, headwise.Full())
        assert cache.report().kernel == "reference"
        # Said once, of a cache and its copies.
        assert copy.deepcopy(cache).report().kernel == "reference"
        # Asked for by name there is nothing to warn of.
        headwise.HeadwiseCache(model, headwise.Full(), kernel="reference")


def test_double_precision_is_for_the_reference_alone():
    assert "float32, bfloat16, float16, not torch.float64" in obstacle("cpu", CPU, torch.float64)
    model = tiny.llama(dtype=torch.float64)
    ids = tiny.prompt(20)
    cache = headwise.HeadwiseCache(model, headwise.Window(7), kernel="reference")
    with torch.no_grad():
        for new in (ids, ids[:, :1], ids[:, 1:2]):
            assert model(input_ids=new, past_key_values=cache).logits.isfinite().all()


def test_the_compiled_kernels_are_for_the_cpu():
    assert obstacle("cpu", torch.device("meta")) == "they are for the CPU"


SCRIPT = Path(cpu.__file__).parent / "csrc" / "compile.py"


def test_the_library_is_that_of_the_sources():
    """What is tested is what was last built."""
    sources = [path for path in SCRIPT.parent.iterdir() if path.suffix in {".h", ".cpp", ".py"}]
    newest = max(path.stat().st_mtime for path in sources)
    assert cpu_library.LIBRARY.stat().st_mtime >= newest, f"build it again: python {SCRIPT.name}"


@pytest.mark.parametrize(("compiler", "message"), [("no-such-compiler", "no-such-compiler"), ("false", "false failed")])
def test_a_compiler_that_is_missing_or_fails_is_named(compiler, message, monkeypatch):
    monkeypatch.setenv("CXX", compiler)
    compile_library = runpy.run_path(str(SCRIPT))["compile_library"]
    before = cpu_library.LIBRARY.stat().st_mtime_ns
    with pytest.raises(RuntimeError, match=message):
        compile_library()
    assert cpu_library.LIBRARY.stat().st_mtime_ns == before


def test_without_a_compiler_the_reason_is_given(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="no C"):
        runpy.run_path(str(SCRIPT))["compile_library"]()


def test_a_library_that_does_not_load_is_an_obstacle(tmp_path):
    broken = tmp_path / cpu_library.LIBRARY.name
    broken.write_bytes(b"not a library")
    program = f"""
import torch
from pathlib import Path
from headwise.kernels.cpu import backend as cpu
from headwise.kernels.cpu import library as cpu_library
cpu_library.LIBRARY = Path({str(broken)!r})
print(cpu.obstacle(torch.device("cpu")))
cpu_library.load.cache_clear()
cpu_library.LIBRARY = Path({str(tmp_path / "none")!r})
print(cpu.obstacle(torch.device("cpu")))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ)
    broken_line, missing_line = done.stdout.splitlines()
    assert broken_line.startswith("the compiled library does not load")
    assert missing_line.startswith("they were not compiled")
