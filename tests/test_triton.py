"""The Triton kernels against the reference kernels, in Triton's interpreter; and that they compile, and never wait."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cases import pairwise, singly
from headwise.kernels import reference
from headwise.kernels.triton import backend, tiles
from headwise.kernels.triton import map as kernel_map
from headwise.kernels.triton import pages as page_launches
from headwise.kernels.triton.backend import KERNELS as kernels
from headwise.store.rows import Rows
from headwise.types import LogitOptions
from kernel_calls import append, attention_and_peaks, column_mass, column_max, new_pool, ragged_decode

os.environ.setdefault("TRITON_INTERPRET", "1")  # before the first import of triton
triton = pytest.importorskip("triton")

CPU = torch.device("cpu")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# The interpreter cuts bfloat16 off where everybody else rounds.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def poison(*shape, dtype=torch.float32):
    return torch.full(shape, float("nan"), dtype=dtype)


def filled(lengths, key_dim, value_dim, dtype=torch.float32, page_size=16, scored=False):
    """A store with those lengths; the columns have gaps and are not in order, and not all pages are full."""
    lengths = torch.tensor(lengths)
    batch, heads = lengths.shape
    longest = max(1, int(lengths.max()))
    keep = torch.arange(longest) < lengths[:, :, None]
    sizes = {"batch": batch, "heads": heads, "key_dim": key_dim, "value_dim": value_dim}
    store = new_pool(**sizes, dtype=dtype, page_size=page_size, scored=scored)
    keys, values = torch.randn(batch, heads, longest, key_dim), torch.randn(batch, heads, longest, value_dim)
    columns = (torch.randperm(longest) * 2).expand(batch, heads, -1)
    scores = torch.rand(batch, heads, longest) if scored else None
    store.commit(store.occupied(), Rows.of(keys.to(dtype), values.to(dtype), columns, scores, keep), spare=page_size)
    store.pages.lengths = store.lengths.T.contiguous().T
    return store


def strided(*shape, dtype=torch.float32):
    """Random numbers as models hand them over: [b, h, ...] views of what was computed as [b, ..., h]."""
    return torch.randn(shape[0], *shape[2:-1], shape[1], shape[-1]).to(dtype).movedim(-2, 1)


def assert_same(found, expected, tolerance, logits=1e-5):
    """Equal up to rounding: of outputs by the one tolerance, of what follows from the logits alone by the other."""
    torch.testing.assert_close(found.output, expected.output, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(found.lse, expected.lse, atol=logits, rtol=logits)
    assert (found.on_kept is None) == (expected.on_kept is None)
    if found.on_kept is not None:
        torch.testing.assert_close(found.on_kept, expected.on_kept, atol=logits, rtol=10 * logits)
        torch.testing.assert_close(found.on_fresh, expected.on_fresh, atol=logits, rtol=10 * logits)


def both(store, group, queries, fresh, *, coded=(), masked=False, options=None, with_mass=True):
    """What the two kernels make of the same random queries and fresh rows."""
    batch, heads = store.lengths.shape
    dtype, key_dim, value_dim = (
        store.pools["keys"].dtype,
        store.pools["keys"].shape[-1],
        store.pools["values"].shape[-1],
    )
    options = options or LogitOptions(key_dim**-0.5)
    views = [store.view(), *coded]
    query = strided(batch, heads, group, queries, key_dim, dtype=dtype)
    # A slice, as `decode` hands them over.
    fresh_keys = strided(batch, heads, fresh + 1, key_dim, dtype=dtype)[:, :, :fresh]
    fresh_values = strided(batch, heads, fresh + 1, value_dim, dtype=dtype)[:, :, :fresh]
    mask = None
    if masked:
        mask = torch.rand(batch, queries + 1, 2 * max(view.longest for view in views) + fresh)[:, 1:] < 0.6
        mask[0, 0] = False  # sees nothing at all
    arguments = (query, views, fresh_keys, fresh_values, mask, options)
    return tuple(ragged_decode(one, *arguments, with_mass=with_mass) for one in (kernels, reference))


SPLITS = ["one split", "many splits"]


@pytest.fixture
def splits(request, monkeypatch):
    """All kept rows in one split, and splits of one block each."""
    monkeypatch.setattr(tiles, "_PROGRAMS", 0 if request.param == "one split" else 1000)


@singly(
    indirect=["splits"],
    case=[
        (torch.float32, 1, 1, 1, False, 64, 64, 16),
        (torch.float32, 2, 3, 5, True, 7, 11, 3),
        (torch.bfloat16, 5, 3, 3, False, 11, 7, 1),
        (torch.bfloat16, 4, 1, 1, True, 20, 20, 16),
        (torch.float16, 3, 1, 2, True, 80, 80, 16),
        (torch.float16, 5, 3, 3, False, 11, 7, 1),
        (torch.float16, 1, 2, 70, True, 16, 32, 3),
    ],
    splits=SPLITS[::-1],
)
def test_decode(case, splits):
    dtype, group, queries, fresh, masked, key_dim, value_dim, page_size = case
    store = filled([[0, 1, 17], [70, 64, 33]], key_dim, value_dim, dtype, page_size)
    found, expected = both(store, group, queries, fresh, masked=masked)
    assert_same(found, expected, TOLERANCE[dtype])
    assert found.output.dtype == dtype
    if masked:
        assert (found.output[0, :, :, 0] == 0).all()
        assert (found.lse[0, :, :, 0] == -torch.inf).all()
        assert (found.on_kept[0, :, 0] == 0).all()


@pytest.mark.parametrize(
    ("group", "key_dim", "value_dim", "dtype"),
    [(8, 128, 128, torch.float16), (4, 256, 128, torch.bfloat16), (1, 192, 256, torch.float16)],
    ids=str,
)
def test_decode_with_large_heads(group, key_dim, value_dim, dtype):
    found, expected = both(filled([[5, 70]], key_dim, value_dim, dtype), group, 1, 1)
    assert_same(found, expected, TOLERANCE[dtype])


@pairwise(indirect=["splits"], masked=[False, True], kind=["soft cap", "sinks"], splits=SPLITS)
def test_decode_with_soft_cap_and_sinks(kind, masked, splits):
    store = filled([[0, 3], [40, 35]], 11, 7)
    options = LogitOptions(0.7, softcap=1.5) if kind == "soft cap" else LogitOptions(0.3, sinks=torch.randn(2, 3))
    found, expected = both(store, 3, 2, 3, masked=masked, options=options)
    assert_same(found, expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_more_query_rows_than_a_program_takes(dtype):
    found, expected = both(filled([[9], [40]], 16, 16, dtype), 4, 19, 21)
    assert_same(found, expected, TOLERANCE[dtype])


def test_more_splits_than_are_merged_at_once(monkeypatch):
    monkeypatch.setattr(tiles, "_PROGRAMS", 1000)
    found, expected = both(filled([[1200, 40]], 8, 8), 2, 1, 1, options=LogitOptions(2.0))
    assert_same(found, expected, TOLERANCE[torch.float32])


def test_large_logits_stay_finite():
    store = filled([[3, 40]], 16, 16)
    found, expected = both(store, 2, 1, 1, options=LogitOptions(90.0))
    assert_same(found, expected, 1e-3)
    assert found.lse.max() > 300


@pytest.mark.parametrize("with_mass", [False, True])
def test_a_store_without_rows_leaves_the_fresh_ones(with_mass):
    for page_size in (16, 3):
        store = filled([[0, 0]], 11, 7, page_size=page_size)
        found, expected = both(store, 2, 2, 2, with_mass=with_mass)
        assert_same(found, expected, 1e-5)
        assert found.on_kept is None or found.on_kept.shape == (1, 2, 2, 0)


def test_a_query_of_another_dtype_than_the_pages():
    store = filled([[3, 40]], 16, 16, torch.float16)
    query, fresh = torch.randn(1, 2, 2, 1, 16), torch.randn(1, 2, 1, 16).half()
    arguments = (query, [store.view()], fresh, fresh, None, LogitOptions(0.25))
    found, expected = (ragged_decode(one, *arguments, with_mass=True) for one in (kernels, reference))
    assert_same(found, expected, TOLERANCE[torch.float16])


# Appending.


def rows_of(store):
    """Everything in the store below each head's length, as numbers that can be compared."""
    rows = store.rows()
    keep = store.occupied()
    contents = [rows.keys, rows.values, rows.columns, rows.scores]
    return [store.lengths.clone(), *(content[keep] for content in contents if content is not None)]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("fresh", "page_size", "scored", "increments", "real"),
    [
        (1, 16, False, False, False),
        (1, 16, True, True, False),
        (3, 1, True, False, True),
        (7, 3, True, True, True),
        (20, 3, False, False, True),
        (37, 16, True, True, False),
    ],
)
def test_append(fresh, page_size, scored, increments, real, dtype, monkeypatch):
    before = [[0, 1, 17], [5, 48, 33]]
    arguments = (
        strided(2, 3, fresh, 11, dtype=dtype),
        strided(2, 3, fresh, 7, dtype=dtype),
        torch.arange(100, 100 + fresh),
        (torch.rand(fresh, 2) < 0.6).T if real else None,
        torch.rand(2, 3, fresh + 2)[:, :, 2:] if scored else None,
    )
    # As wide as the longest head, and undefined beyond each one's length.
    more = poison(2, 3, 48 + 5)[:, :, :48].where(torch.arange(48) >= torch.tensor(before)[:, :, None], torch.rand(48))
    results = []
    for one in (kernels, reference):
        torch.manual_seed(1)
        store = filled(before, 11, 7, dtype, page_size, scored)
        store.pages.reserve(fresh)
        assert append(one, store.view(), *arguments, more if increments else None) is None
        store.pages.longest += fresh
        results.append(rows_of(store))
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)
    assert int(results[0][0].max()) > 48


def test_increments_take_several_programs():
    lengths = [[1030, 5]]
    more = torch.rand(1, 2, 1030)
    results = []
    for one in (kernels, reference):
        torch.manual_seed(1)
        store = filled(lengths, 2, 2, scored=True)
        append(
            one,
            store.view(),
            poison(1, 2, 0, 2),
            poison(1, 2, 0, 2),
            torch.zeros(0).long(),
            None,
            poison(1, 2, 0),
            more,
        )
        results.append(rows_of(store))
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


def test_append_and_decode_take_turns():
    """A store that the kernels fill says the same as one that the reference fills."""
    stores = []
    for one in (kernels, reference):
        torch.manual_seed(1)
        store = filled([[0, 14], [3, 30]], 8, 8, scored=True)
        scores = torch.zeros(2, 2, 1)
        for column in range(60, 64):
            query, keys, values = torch.randn(2, 2, 2, 1, 8), torch.randn(2, 2, 1, 8), torch.randn(2, 2, 1, 8)
            result = ragged_decode(one, query, [store.view()], keys, values, None, LogitOptions(0.3), with_mass=True)
            store.pages.reserve(1)
            on_kept = result.on_kept[:, :, 0]
            append(
                one,
                store.view(),
                keys,
                values,
                torch.tensor([column]),
                None,
                scores + result.on_fresh[:, :, 0],
                on_kept,
            )
            store.pages.longest += 1
        stores.append(rows_of(store))
    for found, expected in zip(*stores, strict=True):
        torch.testing.assert_close(found, expected)


# The profile.


@pytest.mark.parametrize(
    ("dtype", "heads", "group", "key_dim", "masked", "bands", "sampled", "softcap", "sinks"),
    [
        (torch.float32, 2, 3, 13, False, 1, False, None, False),
        (torch.float32, 1, 2, 20, True, 2, False, 2.0, True),
        (torch.bfloat16, 1, 2, 16, False, 2, True, None, True),
        (torch.float16, 2, 3, 80, False, 3, True, None, True),
        (torch.float16, 3, 2, 64, True, 0, False, 30.0, False),
    ],
    ids=str,
)
def test_column_mass(dtype, heads, group, key_dim, masked, bands, sampled, softcap, sinks):
    batch, total = 2, 100
    pads = torch.tensor([0, 21]) if masked else torch.zeros(2, dtype=torch.long)
    real = torch.arange(total) >= pads[:, None]
    positions = (real.cumsum(1) - 1).clamp(min=0)
    columns = torch.arange(30, total)
    if sampled:
        columns = columns[torch.rand(len(columns)) < 0.4]
    mask = None
    if masked:
        everything = torch.ones(total, total, dtype=torch.bool).tril() & real[:, None] & real[:, :, None]
        mask = everything[:, columns]
    weights = torch.rand(batch, total)[:, columns] * real[:, columns]
    options = LogitOptions(0.4, softcap, torch.randn(heads, group) if sinks else None)
    query, keys = (
        strided(batch, heads, group, len(columns), key_dim, dtype=dtype),
        strided(batch, heads, total, key_dim),
    )
    widths = torch.tensor([[20, 7], [1, 60], [100, 33]])[:bands]
    arguments = (query, keys.to(dtype), columns, mask, options, weights, positions, widths)
    (mass, band), (expected_mass, expected_band) = (column_mass(one, *arguments) for one in (kernels, reference))
    assert expected_mass.sum() > 1
    torch.testing.assert_close(mass, expected_mass, atol=2e-5, rtol=2e-4)
    torch.testing.assert_close(band, expected_band, atol=2e-5, rtol=2e-4)
    best, expected_best = (column_max(one, *arguments[:5]) for one in (kernel_map, reference))
    assert expected_best.shape == best.shape == (batch, heads, total)
    torch.testing.assert_close(best, expected_best, atol=2e-5, rtol=2e-4)


def test_rows_that_see_nothing_give_nothing():
    query, keys = torch.randn(1, 1, 1, 4, 8), torch.randn(1, 1, 6, 8)
    mask = torch.ones(1, 4, 6, dtype=torch.bool).tril(2)
    mask[:, 1] = False
    weights = torch.ones(1, 4)
    rest = (columns, positions, widths) = torch.arange(2, 6), torch.arange(6)[None], torch.tensor([[3]])
    mass, band = column_mass(kernels, query, keys, columns, mask, LogitOptions(1.0), weights, positions, widths)
    weights[0, 1] = 0
    expected, inside = column_mass(reference, query, keys, rest[0], mask, LogitOptions(1.0), weights, *rest[1:])
    torch.testing.assert_close(mass, expected)
    torch.testing.assert_close(band, inside)
    best = column_max(kernel_map, query, keys, columns, mask, LogitOptions(1.0))
    torch.testing.assert_close(best, column_max(reference, query, keys, columns, mask, LogitOptions(1.0)))


def test_attention_and_peaks():
    query, keys, values = strided(2, 2, 3, 30, 20), strided(2, 2, 100, 20), strided(2, 2, 100, 9)
    arguments = (query, keys, values, None, LogitOptions(0.4), [slice(0, 4), slice(20, 50), slice(70, 100)])
    for found, expected in zip(
        attention_and_peaks(kernels, *arguments), attention_and_peaks(reference, *arguments), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


# What the interpreter does not show.


class Unlaunched:
    """A kernel that says its name instead of running: the interpreter itself reads tensors."""

    def __init__(self, name, launched):
        self.launch = lambda *_, **__: launched.append(name)

    def __getitem__(self, grid):
        return self.launch


@pytest.fixture
def launches(monkeypatch):
    launched = []
    code = SimpleNamespace(**{name: Unlaunched(name, launched) for name in ("attend", "combine", "weigh", "write")})
    monkeypatch.setattr(page_launches, "device_code", lambda: code)
    return launched


def absent(record):
    """The same without what is in its tensors: whatever asks for it, as waiting for the device does, raises."""
    tensors = {f.name: getattr(record, f.name) for f in fields(record)}
    return replace(record, **{name: t.to("meta") for name, t in tensors.items() if isinstance(t, torch.Tensor)})


def test_reading_absent_content_raises():
    reads = [torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.nonzero, torch.unique, bool]
    for read in [*reads, lambda t: t[t > 0], lambda t: t.masked_select(t > 0), lambda t: range(t)]:
        with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
            read(torch.ones((), dtype=torch.long, device="meta"))


@pytest.mark.parametrize("masked", [False, True])
def test_decode_never_waits(masked, launches):
    store = filled([[0, 3], [40, 35]], 11, 7, scored=True)
    options = LogitOptions(0.3, 2.0, torch.randn(2, 3, device="meta"))
    mask = torch.ones(2, 1, 99, dtype=torch.bool, device="meta") if masked else None
    rows = [strided(*shape).to("meta") for shape in [(2, 2, 3, 1, 11), (2, 2, 1, 11), (2, 2, 1, 7)]]
    for with_mass in (False, True):
        ragged_decode(kernels, rows[0], [absent(store.view())], *rows[1:], mask, options, with_mass=with_mass)
    assert launches == ["attend", "combine", "attend", "combine", "weigh"]


def test_append_never_waits(launches):
    pages = absent(filled([[0, 3], [40, 35]], 11, 7, scored=True).view())
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


def test_without_triton_the_obstacle_says_so():
    program = """
import sys, torch
sys.modules["triton"] = None
from headwise.kernels.triton import backend
print(backend.obstacle(torch.device("cuda")))
"""
    assert run(program).startswith("Triton cannot be imported")


COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from headwise.kernels.interface import PageView
from headwise.kernels.triton import map as kernel_map
from headwise.kernels.triton.backend import KERNELS as kernels
from headwise.types import LogitOptions
from kernel_calls import append, column_mass, column_max, ragged_decode

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

def token(dtype, dim, longest, rich):
    pool, table = torch.zeros(8, 16, dim, dtype=dtype), torch.zeros(1, 2, longest // 16 + 1).int()
    scores = torch.zeros(8, 16) if rich else None
    pages = PageView(pool, pool, torch.zeros(8, 16).int(), scores, table, torch.zeros(1, 2).long(), longest)
    query, fresh = torch.zeros(1, 2, 4, 1, dim, dtype=dtype), torch.zeros(1, 2, 1, dim, dtype=dtype)
    mask = torch.ones(1, 3, longest + 40).bool() if rich else None
    options = LogitOptions(0.1, 5.0, torch.zeros(2, 4)) if rich else LogitOptions(0.1)
    now = None if mask is None else mask[:, 1:2]
    found = ragged_decode(kernels, query, [pages], fresh, fresh, now, options, with_mass=rich)
    rest = (None, None, None)
    if rich:
        rest = (mask.diagonal(longest, -2, -1)[:, :1], found.on_fresh[:, :, 0], found.on_kept[:, :, 0])
    append(kernels, pages, fresh, fresh, torch.arange(99)[longest % 9 :][:1], *rest)

def profile(dtype, dim, bands):
    query, keys = torch.zeros(1, 2, 4, 99, dim, dtype=dtype), torch.zeros(1, 2, 99, dim, dtype=dtype)
    positions, widths = torch.arange(99), torch.ones(bands, 1).long()
    column_mass(kernels, query, keys, positions, None, LogitOptions(0.1), torch.ones(1, 99), positions[None], widths)
    column_max(kernel_map, query, keys, positions, None, LogitOptions(0.1))

for longest in (1, 61, 62, 64, 75):
    token(torch.bfloat16, 64, longest, True)
profile(torch.bfloat16, 64, 2)
print(sorted((name, len(kinds)) for name, kinds in compiled.items()))
token(torch.float32, 32, 60, False)
profile(torch.float32, 32, 0)
"""


def test_every_kernel_compiles_for_a_gpu(tmp_path):
    """What the interpreter takes, the compiler may refuse; it needs no GPU. And a longer cache compiles nothing new."""
    names = ["attend", "column_sums", "combine", "row_sums", "weigh", "write"]
    found = run(COMPILE, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    # Sums of columns and maxima of them are two.
    assert found == str([(name, 1 + (name == "column_sums")) for name in names])
