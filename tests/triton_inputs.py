"""Triton inputs: the same call of its kernels and of the reference, and programs that only compile them."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from headwise.kernels import reference
from headwise.kernels.triton import tiles
from headwise.kernels.triton.backend import KERNELS as kernels
from kernel_inputs import decode_request, filled, poison, some_marks, strided

__all__ = ["filled", "poison", "some_marks", "strided"]

os.environ.setdefault("TRITON_INTERPRET", "1")  # before the first import of triton
triton = pytest.importorskip("triton")

CPU = torch.device("cpu")


def assert_same(found, expected, tolerance, logits=1e-5):
    """Equal up to rounding: of outputs by the one tolerance, of what follows from the logits alone by the other."""
    torch.testing.assert_close(found.output, expected.output, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(found.lse, expected.lse, atol=logits, rtol=logits)
    assert (found.on_kept is None) == (expected.on_kept is None)
    if found.on_kept is not None:
        torch.testing.assert_close(found.on_kept, expected.on_kept, atol=logits, rtol=10 * logits)
        torch.testing.assert_close(found.on_fresh, expected.on_fresh, atol=logits, rtol=10 * logits)


def both(*arguments, **options):
    """What the two kernels make of the same random queries and fresh rows."""
    request = decode_request(*arguments, **options)
    return tuple(one.ragged_decode(request) for one in (kernels, reference))


SPLITS = ["one split", "many splits"]


@pytest.fixture
def splits(request, monkeypatch):
    """All rows of a view in one split, and splits of one block each."""
    monkeypatch.setattr(tiles, "_PROGRAMS", 0 if request.param == "one split" else 1000)


class Unlaunched:
    """A kernel that says its name instead of running: the interpreter itself reads tensors."""

    def __init__(self, name, launched):
        self.launch = lambda *_, **__: launched.append(name)

    def __getitem__(self, grid):
        return self.launch


def absent(record):
    """The same without what is in its tensors: whatever asks for it, as waiting for the device does, raises."""
    tensors = {f.name: getattr(record, f.name) for f in fields(record)}
    return replace(record, **{name: t.to("meta") for name, t in tensors.items() if isinstance(t, torch.Tensor)})


def run(program, **environment):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from headwise.kernels.interface import AttentionMap, DecodeRequest, Marks, MassRequest, PageView
from headwise.kernels.triton import map as kernel_map
from headwise.kernels.triton.backend import KERNELS as kernels
from headwise.types import LogitOptions
from kernel_calls import append

class Hopper:
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device=None: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

triton.runtime.driver.set_active(Hopper())
compiled = {}

def compile_only(self, grid):
    def launch(*arguments, **options):
        kernel = self.run(*arguments, grid=grid, warmup=True, **options)
        assert kernel.metadata.shared <= 227 * 1024
        compiled.setdefault(self.fn.__name__, set()).add(kernel)
    return launch

JITFunction.__getitem__ = compile_only

def marks_of(group, queries, count, fresh):
    # Of an address and a stride that change.
    columns = torch.zeros(1, count + 2)[:, count % 3 :][:, :count]
    return Marks(torch.zeros(2, group, 1).expand(1, -1, -1, queries), columns, fresh)

def token(dtype, dim, longest, rich, marked):
    pool, table = torch.zeros(8, 16, dim, dtype=dtype), torch.zeros(1, 2, longest // 16 + 1).int()
    scores, biases = (torch.zeros(8, 16), torch.zeros(8, 16).half()) if rich else (None, None)
    columns, lengths = torch.zeros(8, 16).int(), torch.zeros(1, 2).long()
    pages = PageView(pool, pool, columns, scores, table, lengths, longest, None, biases)
    query, fresh = torch.zeros(1, 2, 4, 1, dim, dtype=dtype), torch.zeros(1, 2, 1, dim, dtype=dtype)
    mask = torch.ones(1, 3, longest + 40).bool() if rich else None
    options = LogitOptions(0.1, 5.0, torch.zeros(2, 4)) if rich else LogitOptions(0.1)
    now = None if mask is None else mask[:, 1:2]
    marks = marks_of(4, 1, longest, torch.zeros(1, 1) if rich else None) if marked else None
    found = kernels.ragged_decode(DecodeRequest(query, [pages], fresh, fresh, now, options, rich, marks))
    rest = (None, None, None)
    if rich:
        rest = (mask.diagonal(longest, -2, -1)[:, :1], found.on_fresh[:, :, 0], found.on_kept[:, :, 0])
    append(kernels, pages, fresh, fresh, torch.arange(99)[longest % 9 :][:1], *rest)

def profile(dtype, dim, bands, marked):
    query, keys = torch.zeros(1, 2, 4, 99, dim, dtype=dtype), torch.zeros(1, 2, 99, dim, dtype=dtype)
    positions, widths = torch.arange(99), torch.ones(bands, 1).long()
    map = AttentionMap(query, keys, None, LogitOptions(0.1), positions, marks_of(4, 99, 99, None) if marked else None)
    kernels.column_mass(MassRequest(map, torch.ones(1, 99), positions[None], widths))
    kernel_map.column_max(map)

for longest in (1, 61, 62, 64, 75):
    token(torch.bfloat16, 64, longest, True, False)
    token(torch.bfloat16, 64, longest, True, True)
profile(torch.bfloat16, 64, 2, False)
profile(torch.bfloat16, 64, 2, True)
print(sorted((name, len(kinds)) for name, kinds in compiled.items()))
token(torch.float32, 32, 60, False, False)
profile(torch.float32, 32, 0, False)
token(torch.float32, 32, 60, False, True)
"""
