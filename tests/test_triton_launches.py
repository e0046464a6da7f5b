"""What Triton's interpreter does not show: that kernels never wait, fill the device, and compile for a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from headwise.kernels.triton import backend, tiles
from headwise.kernels.triton import pages as page_launches
from headwise.kernels.triton.backend import KERNELS as kernels
from headwise.types import LogitOptions
from kernel_calls import append, ragged_decode
from triton_inputs import COMPILE, CPU, Unlaunched, absent, filled, run, strided


@pytest.fixture
def launches(monkeypatch):
    launched = []
    code = SimpleNamespace(**{name: Unlaunched(name, launched) for name in ("attend", "combine", "weigh", "write")})
    monkeypatch.setattr(page_launches, "device_code", lambda: code)
    return launched


def test_reading_absent_content_raises():
    reads = [torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.nonzero, torch.unique, bool]
    for read in [*reads, lambda t: t[t > 0], lambda t: t.masked_select(t > 0), lambda t: range(t)]:
        with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
            read(torch.ones((), dtype=torch.long, device="meta"))


@pytest.mark.parametrize("masked", [False, True])
def test_decode_never_waits(masked, launches):
    store = filled([[0, 3], [40, 35]], 11, 7, scored=True, biased=masked)
    options = LogitOptions(0.3, 2.0, torch.randn(2, 3, device="meta"))
    mask = torch.ones(2, 1, 99, dtype=torch.bool, device="meta") if masked else None
    rows = [strided(*shape).to("meta") for shape in [(2, 2, 3, 1, 11), (2, 2, 1, 11), (2, 2, 1, 7)]]
    for with_mass in (False, True):
        ragged_decode(kernels, rows[0], [absent(store.view())], *rows[1:], mask, options, with_mass=with_mass)
    assert launches == ["attend", "combine", "attend", "combine", "weigh"]


def test_append_never_waits(launches):
    pages = absent(filled([[0, 3], [40, 35]], 11, 7, scored=True, biased=True).view())
    with torch.device("meta"):
        keys, values, columns = torch.ones(2, 2, 20, 11), torch.ones(2, 2, 20, 7), torch.ones(20, dtype=torch.long)
        real, scores, more = torch.ones(2, 20, dtype=torch.bool), torch.ones(2, 2, 20), torch.ones(2, 2, 40)
    one = keys[:, :, :1], values[:, :, :1], columns[:1]
    append(kernels, pages, *one, None, scores[:, :, :1], None)
    append(kernels, pages, *one, None, scores[:, :, :1], more)
    append(kernels, pages, keys, values, columns, real, scores, more)
    assert launches == ["write"] * 3


def test_splits_fill_the_device(monkeypatch):
    monkeypatch.setattr(tiles, "_processors", lambda device: 132)
    for longest, programs in [(0, 8), (1, 8), (257, 8), (5000, 8), (131072, 8), (131072, 64), (131072, 5000)]:
        splits, rows = tiles.cut_into_splits(longest, programs, 64, CPU)
        assert rows % 64 == 0
        assert (splits - 1) * rows < longest <= splits * rows or splits == longest == 0
        assert rows == 64 or programs * splits >= 2 * 132
        assert splits <= 1 or programs * splits <= 5 * 132


def test_obstacle(monkeypatch):
    assert backend.obstacle(CPU) is None
    assert backend.obstacle(torch.device("cuda")) is None
    assert "'mps'" in backend.obstacle(torch.device("mps"))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "TRITON_INTERPRET=1" in backend.obstacle(CPU)
    assert backend.obstacle(torch.device("cuda")) is None


def test_without_triton_the_obstacle_says_so():
    program = """
import sys, torch
sys.modules["triton"] = None
from headwise.kernels.triton import backend
print(backend.obstacle(torch.device("cuda")))
"""
    assert run(program).startswith("Triton cannot be imported")


def test_every_kernel_compiles_for_a_gpu(tmp_path):
    """What the interpreter takes, the compiler may refuse; it needs no GPU. And a longer cache compiles nothing new."""
    names = ["attend", "column_sums", "combine", "row_sums", "weigh", "write"]
    found = run(COMPILE, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    # Marks or none are two; so are sums of columns and maxima of them.
    counts = {"attend": 2, "row_sums": 2, "column_sums": 4}
    assert found == str([(name, counts.get(name, 1)) for name in names])
