"""The Triton kernels on pages of codes against the reference kernels, in its interpreter; and that they compile."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from cases import pairwise, singly
from headwise.kernels.backends import choose
from headwise.kernels.triton import codes as triton_codes
from headwise.kernels.triton import pages as launches
from headwise.kernels.triton.backend import KERNELS as kernels
from headwise.quant.formats import RowFormat
from headwise.types import LogitOptions
from kernel_calls import add_increments, ragged_decode
from kernel_inputs import coded_pages
from triton_inputs import COMPILE, CPU, SPLITS, Unlaunched, absent, both, filled, poison, run, splits, strided
from triton_inputs import assert_same as assert_close

__all__ = ["splits"]

# Numbers of a 16-bit model are products in fp16, queries included, which are turned in the reference exactly.
TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (1e-2, 2e-3), torch.float16: (3e-3, 2e-3)}


def assert_same(found, expected, dtype):
    assert_close(found, expected, *TOLERANCE[dtype])


@singly(
    indirect=["splits"],
    case=[
        (torch.float32, (8, 8), None, (1, 1), 1, False, False, 64, 64, 16),
        (torch.float32, (4, 8), 4, (2, 3), 5, True, True, 12, 20, 3),
        (torch.float32, (4, 4), None, (3, 1), 1, False, True, 20, 6, 16),
        (torch.bfloat16, (8, 8), 5, (5, 1), 1, True, False, 15, 25, 16),
        (torch.bfloat16, (4, 4), None, (4, 1), 1, False, False, 20, 20, 1),
        (torch.float16, (8, 4), None, (3, 1), 2, True, True, 80, 80, 16),
        (torch.float16, (4, 4), 8, (2, 2), 3, False, True, 40, 24, 3),
        (torch.float16, (4, 8), 16, (1, 2), 70, True, False, 16, 32, 3),
    ],
    splits=SPLITS[::-1],
)
def test_decode(case, splits):
    dtype, bits, group, members, fresh, masked, biased, key_dim, value_dim, page_size = case
    # Each head has rows of both kinds, of one, or of none.
    like = key_dim, value_dim, dtype, page_size
    store = filled([[0, 1, 17], [9, 0, 33]], *like, biased=biased)
    coded = coded_pages([[0, 40, 3], [70, 64, 0]], RowFormat(*bits, group), *like, biased=biased)
    found, expected = both(store, *members, fresh, coded=[coded.view()], masked=masked)
    assert_same(found, expected, dtype)
    assert found.output.dtype == dtype
    assert found.on_kept.shape[-1] == 33 + 70
    if masked:
        assert (found.output[0, :, :, 0] == 0).all()
        assert (found.lse[0, :, :, 0] == -torch.inf).all()
        assert (found.on_kept[0, :, 0] == 0).all()


@pairwise(
    indirect=["splits"],
    dtype=[torch.float32, torch.float16],
    kind=["soft cap", "sinks"],
    biased=[True, False],
    splits=SPLITS,
)
def test_heads_spread_over_formats(kind, dtype, biased, splits):
    """Every head has codes in one format of three, one of them unused, and some have no exact rows."""
    store = filled([[3, 0, 30]], 16, 24, dtype, biased=biased)
    lengths = [[[50, 0, 0]], [[0, 0, 0]], [[0, 20, 0]], [[0, 0, 37]]]
    formats = RowFormat(8, 8), RowFormat(8, 8, 2), RowFormat(4, 4, 8), RowFormat(8, 4)
    parts = [coded_pages(*each, 16, 24, dtype, biased=biased) for each in zip(lengths, formats, strict=True)]
    coded = [part.view() for part in parts]
    options = LogitOptions(0.4, 2.0) if kind == "soft cap" else LogitOptions(0.3, None, torch.randn(3, 2))
    found, expected = both(store, 2, 2, 3, coded=coded, masked=True, options=options)
    assert_same(found, expected, dtype)
    assert found.on_kept.shape[-1] == 30 + 50 + 20 + 37


@pytest.mark.parametrize("longest", [0, 45])
@pytest.mark.parametrize("with_mass", [False, True])
def test_empty_views(longest, with_mass):
    """No exact row at all, and codes or none."""
    store = filled([[0, 0]], 16, 8)
    parts = (
        coded_pages([[0, 0]], RowFormat(8, 8), 16, 8),
        coded_pages([[longest, longest // 2]], RowFormat(4, 4), 16, 8),
    )
    coded = [part.view() for part in parts]
    assert store.longest == coded[0].longest == 0
    coded[0] = replace(coded[0], table=coded[0].table[:, :, :0])
    found, expected = both(store, 3, 1, 1, coded=coded, with_mass=with_mass)
    assert_same(found, expected, torch.float32)


def test_as_long_as_the_pages_have_room():
    """A captured step does not know the lengths: every view is as long as its pages, and most of that is undefined."""
    store = filled([[5, 20]], 16, 16, biased=True)
    part = coded_pages([[33, 0]], RowFormat(8, 4), 16, 16, page_size=3, biased=True)
    coded = replace(part.view(), longest=part.view().capacity)
    assert coded.longest > 33
    found, expected = both(store, 2, 1, 1, coded=[coded])
    assert_same(found, expected, torch.float32)
    assert (found.on_kept[0, 0, 0, 20 + 33 :] == 0).all()
    assert (found.on_kept[0, 1, 0, 20:] == 0).all()


@pytest.mark.parametrize(
    ("group", "key_dim", "value_dim", "dtype"),
    [(8, 128, 128, torch.bfloat16), (4, 256, 128, torch.float16), (1, 192, 256, torch.float16)],
    ids=str,
)
def test_large_heads(group, key_dim, value_dim, dtype):
    coded = [coded_pages([[5, 70]], RowFormat(*bits), key_dim, value_dim, dtype).view() for bits in ((8, 4), (4, 8))]
    found, expected = both(filled([[5, 0]], key_dim, value_dim, dtype), group, 1, 1, coded=coded)
    assert_same(found, expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_more_query_rows_than_a_program_takes(dtype):
    coded = [coded_pages([[9, 40]], RowFormat(4, 8), 16, 16, dtype).view()]
    found, expected = both(filled([[9, 0]], 16, 16, dtype), 2, 17, 18, coded=coded)
    assert_same(found, expected, dtype)


def test_large_logits_stay_finite():
    coded = [coded_pages([[3, 40]], RowFormat(8, 8), 16, 16).view()]
    found, expected = both(filled([[3, 4]], 16, 16), 2, 1, 1, coded=coded, options=LogitOptions(90.0))
    assert_close(found, expected, 1e-3, 1e-3)
    assert found.lse.max() > 300


# Scores.


def test_increments_of_rows_that_are_codes():
    """They reach the scores of the rows that are there, and nothing else changes."""
    lengths = [[1030, 5], [0, 47]]
    increments = poison(2, 2, 7 + 1030)
    increments[:, :, :7] = torch.rand(7)
    there = torch.arange(1030) < torch.tensor(lengths)[:, :, None]
    increments[:, :, 7:] = torch.rand(2, 2, 1030).where(there, torch.nan)
    results = []
    for name in ("triton", "reference"):
        torch.manual_seed(1)
        store, part = (
            filled([[7, 7], [7, 7]], 4, 4, scored=True),
            coded_pages(lengths, RowFormat(4, 8), 4, 4, scored=True),
        )
        before, scores = {name: pool.clone() for name, pool in part.pool.pools.items()}, store.kept("scores").clone()
        add_increments(choose(name, CPU), [store.view(), part.view()], increments)
        torch.testing.assert_close(store.kept("scores") - scores, increments[:, :, :7])
        assert torch.equal(part.pool.lengths, torch.tensor(lengths))
        for name, pool in part.pool.pools.items():
            assert name == "scores" or torch.equal(pool.nan_to_num(), before[name].nan_to_num())
        results.append(part.pool.kept("scores")[there])
    assert torch.equal(*results)
    assert results[0].max() > 1


# What the interpreter does not show.


def test_decode_never_waits_and_reads_codes_where_they_lie(monkeypatch):
    launched = []

    class Launched(Unlaunched):
        def __init__(self, name):
            self.launch = lambda *arguments, **_: launched.append((name, arguments))

    names = ("attend", "attend_codes", "combine", "turn", "weigh")
    code = SimpleNamespace(**{name: Launched(name) for name in names})
    monkeypatch.setattr(launches, "device_code", lambda: code)
    monkeypatch.setattr(triton_codes, "device_code", lambda: code)
    formats = RowFormat(8, 8), RowFormat(4, 4), RowFormat(4, 8)
    lengths = [[3, 0]], [[0, 0]], [[40, 3]]
    coded = [coded_pages(own, format, 16, 16).view() for own, format in zip(lengths, formats, strict=True)]
    matrix = torch.empty(16, 16, device="meta")
    for index, view in enumerate(coded):
        coding = replace(absent(view.coding), key_hadamard=matrix, value_hadamard=matrix)
        coded[index] = replace(absent(view), coding=coding)
    views = [absent(filled([[0, 3]], 16, 16).view()), *coded]
    rows = [strided(*shape).to("meta") for shape in [(1, 2, 3, 1, 16), (1, 2, 1, 16), (1, 2, 1, 16)]]
    for with_mass in (False, True):
        ragged_decode(kernels, rows[0], views, *rows[1:], None, LogitOptions(0.3), with_mass=with_mass)
    step = ["attend", "turn", "attend_codes", "attend_codes", "combine"]
    assert [name for name, _ in launched] == [*step, *step, "weigh"]
    for (_, arguments), view in zip(launched[2:4], (coded[0], coded[2]), strict=True):
        assert arguments[1] is view.keys and arguments[2] is view.values
    launched.clear()
    ragged_decode(kernels, rows[0], [views[0], coded[1]], *rows[1:], None, LogitOptions(0.3), with_mass=True)
    assert [name for name, _ in launched] == ["attend", "combine", "weigh"]


CODES = """
from headwise.kernels.interface import Coding

def coded(dim, longest, biases, rotation, key_bits, value_bits, groups):
    steps, table = torch.zeros(8, 16, 2 * groups).half(), torch.zeros(1, 2, longest // 16 + 1).int()
    coding = Coding(key_bits, value_bits, steps, steps, rotation, rotation)
    keys, values = (torch.zeros(8, 16, dim * bits // 8).byte() for bits in (key_bits, value_bits))
    columns, lengths = torch.zeros(8, 16).int(), torch.zeros(1, 2).long()
    return PageView(keys, values, columns, torch.zeros(8, 16), table, lengths, longest, coding, biases)

def token(dtype, dim, group, longest, kinds, rich, biased, marked):
    pool, table = torch.zeros(8, 16, dim, dtype=dtype), torch.zeros(1, 2, 4).int()
    biases = torch.zeros(8, 16).half() if biased else None
    pages = PageView(pool, pool, torch.zeros(8, 16).int(), None, table, torch.zeros(1, 2).long(), 36, None, biases)
    rotation = torch.zeros(dim, dim)
    views = [pages, *(coded(dim, longest + more, biases, rotation, *kind) for more, kind in enumerate(kinds))]
    query, fresh = torch.zeros(1, 2, group, 1, dim, dtype=dtype), torch.zeros(1, 2, 1, dim, dtype=dtype)
    mask = torch.ones(1, 1, 2 * longest + 99).bool() if rich else None
    options = LogitOptions(0.1, 5.0, torch.zeros(2, group)) if rich else LogitOptions(0.1)
    marks = marks_of(group, 1, longest, None) if marked else None
    found = kernels.ragged_decode(DecodeRequest(query, views, fresh, fresh, mask, options, rich, marks))
    if rich:
        add_increments(kernels, views[1:], found.on_kept[:, :, 0, 36:])

for longest in (1, 61, 62, 64, 75):
    token(torch.bfloat16, 64, 3, longest, [(8, 8, 1)], True, True, False)
    token(torch.bfloat16, 64, 3, longest, [(8, 8, 1)], True, True, True)
print(sorted((name, len(kinds)) for name, kinds in compiled.items()))
token(torch.bfloat16, 128, 4, 60, [(4, 4, 4), (8, 4, 1)], False, False, False)
token(torch.float16, 256, 1, 60, [(4, 8, 1)], False, True, True)
token(torch.float32, 32, 2, 60, [(8, 8, 2), (4, 4, 1)], False, False, False)
"""


def test_every_kernel_compiles_for_a_gpu(tmp_path):
    """What the interpreter takes, the compiler may refuse; it needs no GPU. And a longer cache compiles nothing new."""
    program = COMPILE[: COMPILE.index("def token(")] + CODES
    program = "from kernel_calls import add_increments\n" + program
    found = run(program, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    names = ["attend", "attend_codes", "combine", "turn", "weigh", "write"]
    # Marks or none are two.
    assert found == str([(name, 1 + name.startswith("attend")) for name in names])
