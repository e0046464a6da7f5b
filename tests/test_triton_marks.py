"""Marks of columns, and gates of queries, in the Triton kernels, against the reference kernels in its interpreter."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from cases import pairwise, singly
from headwise.kernels import reference
from headwise.kernels.interface import AttentionMap, DecodeRequest, Marks, MassRequest, PeaksRequest
from headwise.kernels.triton import codes as triton_codes
from headwise.kernels.triton import map as kernel_map
from headwise.kernels.triton import pages as launches
from headwise.kernels.triton.backend import KERNELS as kernels
from headwise.quant.formats import RowFormat
from headwise.types import LogitOptions
from kernel_inputs import packed_codes
from triton_inputs import SPLITS, absent, assert_same, both, filled, some_marks, splits, strided

__all__ = ["splits"]

# The interpreter cuts bfloat16 off where everybody else rounds.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}

KINDS = {
    "plain": LogitOptions(0.3),
    "soft cap": LogitOptions(0.7, softcap=1.5),
    "sinks": LogitOptions(0.3, sinks=torch.tensor([[0.3, -1.0, 2.0], [0.5, 1.0, 0.0]])),
}


def columns_of(store):
    """The columns of all rows that are there."""
    return store.rows().columns[store.occupied()]


@pairwise(
    indirect=["splits"],
    rows=[(1, 1), (3, 5), (1, 4), (2, 70)],
    marked=[0, 13, 60, 1000],
    with_fresh=[False, True],
    masked=[False, True],
    kind=list(KINDS),
    biased=[False, True],
    expanded=[False, True],
    splits=SPLITS,
)
def test_decode(rows, marked, with_fresh, masked, kind, biased, expanded, splits):
    store, (queries, fresh) = filled([[0, 3], [40, 35]], 11, 7, biased=biased), rows
    marks = some_marks(2, 2, 3, queries, marked, fresh if with_fresh else None, expanded=expanded)
    assert 13 < columns_of(store).max() < 1000
    found, expected = both(store, 3, queries, fresh, masked=masked, options=KINDS[kind], marks=marks)
    assert_same(found, expected, TOLERANCE[torch.float32])


@singly(
    dtype=[torch.bfloat16, torch.float16, torch.float16],
    group=[5, 2, 4],
    dims=[(11, 7), (128, 128), (64, 80)],
    masked=[True, False, False],
)
def test_decode_on_tensor_cores(dtype, group, dims, masked):
    store = filled([[5, 70]], *dims, dtype)
    marks = some_marks(1, 2, group, 2, 60, 3)
    assert_same(*both(store, group, 2, 3, masked=masked, marks=marks), TOLERANCE[dtype])


def test_more_query_rows_than_a_program_takes():
    marks = some_marks(2, 1, 4, 19, 50, 21)
    assert_same(*both(filled([[9], [40]], 16, 16), 4, 19, 21, marks=marks), TOLERANCE[torch.float32])


def test_marks_and_gates_may_lie_in_any_way():
    """Marks whose columns are not dense or are one number, of the sequences or all the same, and gates reversed."""
    store = filled([[9, 20], [40, 3]], 8, 8)
    gates = torch.randn(3, 2, 2, 2).permute(3, 2, 1, 0)
    one = torch.randn(1, 1)
    for columns, of_fresh in [
        (torch.randn(50, 2).T, torch.randn(4, 2).T),
        (torch.randn(1, 50).expand(2, -1), torch.randn(1, 4).expand(2, -1)),
        (one.expand(2, 50), one.expand(2, 4)),
    ]:
        marks = Marks(gates, columns, of_fresh)
        assert_same(*both(store, 2, 3, 4, marks=marks), TOLERANCE[torch.float32])


@singly(
    indirect=["splits"],
    dtype=[torch.float32, torch.float32, torch.float16, torch.bfloat16],
    format=[RowFormat(8, 8), RowFormat(4, 4), RowFormat(8, 4, 8), RowFormat(4, 8)],
    masked=[False, True],
    biased=[True, False],
    kind=["soft cap", "plain", "sinks"],
    splits=SPLITS,
)
def test_decode_over_codes(dtype, format, masked, biased, kind, splits):
    """Each head has rows of both kinds, of one, or of none."""
    store = filled([[0, 17], [9, 33]], 16, 24, dtype, biased=biased)
    coded = packed_codes([[50, 0], [30, 64]], format, 16, 24, dtype, biased=biased)
    assert columns_of(coded.pool).max() > 70
    marks = some_marks(2, 2, 3, 2, 70, 5)
    given = {"coded": [coded.view()], "masked": masked, "options": KINDS[kind], "marks": marks}
    tolerances = (1e-5, 1e-5) if dtype is torch.float32 else (1e-2, 2e-3)
    assert_same(*both(store, 3, 2, 5, **given), *tolerances)


def test_as_long_as_the_pages_have_room():
    """A captured step does not know the lengths: most columns are those of no row, and no mark is looked up by them."""
    store = filled([[5, 20]], 16, 16)
    part = packed_codes([[33, 0]], RowFormat(8, 4), 16, 16, page_size=3)
    exact, coded = (replace(view, longest=view.capacity) for view in (store.view(), part.view()))
    query, keys, values = strided(1, 2, 3, 1, 16), strided(1, 2, 1, 16), strided(1, 2, 1, 16)
    marks = some_marks(1, 2, 3, 1, 1000, 1)
    request = DecodeRequest(query, [exact, coded], keys, values, None, LogitOptions(0.3), True, marks)
    assert_same(kernels.ragged_decode(request), reference.ragged_decode(request), TOLERANCE[torch.float32])


def test_what_has_no_gate_or_no_mark_is_what_it_is_without_marks():
    store = filled([[9, 20], [40, 3]], 8, 8)
    coded = packed_codes([[5, 7], [0, 20]], RowFormat(8, 8), 8, 8)
    query, keys, values = strided(2, 2, 3, 2, 8), strided(2, 2, 4, 8), strided(2, 2, 4, 8)
    marks = some_marks(2, 2, 3, 2, 60, 4)
    request = DecodeRequest(query, [store.view(), coded.view()], keys, values, None, LogitOptions(0.3), True)
    plain, found = kernels.ragged_decode(request), kernels.ragged_decode(replace(request, marks=marks))
    without = marks.gates == 0
    assert without.any() and not without.all()
    assert torch.equal(found.output[without], plain.output[without])
    assert torch.equal(found.lse[without], plain.lse[without])
    assert not (found.lse[~without] == plain.lse[~without]).any()
    for nothing in (Marks(marks.gates, marks.columns[:, :0]), replace(marks, gates=torch.zeros(2, 2, 3, 2))):
        found = kernels.ragged_decode(replace(request, marks=nothing))
        for name, tensor in vars(plain).items():
            assert torch.equal(getattr(found, name), tensor), name


# The profile.


def marked_map(dtype, kind, *, masked, sampled, expanded):
    """A map of two heads with three queries each; with a mask the second sequence begins later."""
    batch, total = 2, 100
    real = torch.arange(total) >= torch.tensor([[0], [21 if masked else 0]])
    columns = torch.arange(30, total)
    if sampled:
        columns = columns[torch.rand(len(columns)) < 0.4]
    mask = None
    if masked:
        everything = torch.ones(total, total, dtype=torch.bool).tril() & real[:, None] & real[:, :, None]
        mask = everything[:, columns]
    query, keys = strided(batch, 2, 3, len(columns), 20, dtype=dtype), strided(batch, 2, total, 20, dtype=dtype)
    marks = some_marks(batch, 2, 3, len(columns), total, expanded=expanded)
    return AttentionMap(query, keys, mask, KINDS[kind], columns, marks), real


@singly(
    dtype=[torch.float32, torch.float16, torch.float32, torch.bfloat16],
    kind=["plain", "soft cap", "sinks", "plain"],
    masked=[False, True, True, False],
    sampled=[False, True],
    expanded=[True, False, False, True],
    bands=[1, 2, 0, 3],
)
def test_column_mass(dtype, kind, masked, sampled, expanded, bands):
    map, real = marked_map(dtype, kind, masked=masked, sampled=sampled, expanded=expanded)
    weights = torch.rand(real.shape)[:, map.columns] * real[:, map.columns]
    widths = torch.tensor([[20, 7], [1, 60], [100, 33]])[:bands]
    request = MassRequest(map, weights, (real.cumsum(1) - 1).clamp(min=0), widths)
    plain = reference.column_mass(replace(request, map=replace(map, marks=None)))
    for found, expected, without in zip(
        kernels.column_mass(request), reference.column_mass(request), plain, strict=True
    ):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-4)
        assert not expected.numel() or not torch.allclose(expected, without, atol=1e-2)
    best, expected_best = kernel_map.column_max(map), reference.column_max(map)
    torch.testing.assert_close(best, expected_best, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_and_peaks(kind):
    query, keys, values = strided(2, 2, 3, 30, 20), strided(2, 2, 100, 20), strided(2, 2, 100, 9)
    map = AttentionMap(query, keys, None, KINDS[kind], marks=some_marks(2, 2, 3, 30, 100))
    request = PeaksRequest(map, values, [slice(0, 4), slice(20, 50), slice(70, 100)])
    found, expected = kernels.attention_and_peaks(request), reference.attention_and_peaks(request)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
    plain = reference.attention_and_peaks(replace(request, map=replace(map, marks=None)))
    assert not torch.allclose(plain[1], expected[1], atol=1e-2)


# What the interpreter does not show.


class Told:
    """A kernel that notes what it is told by name, instead of running."""

    def __init__(self, name, told):
        self.launch = lambda *_, **named: told.append((name, named))

    def __getitem__(self, grid):
        return self.launch


def kernels_that_tell(names, monkeypatch):
    told = []
    code = SimpleNamespace(**{name: Told(name, told) for name in names})
    monkeypatch.setattr(launches, "device_code", lambda: code)
    monkeypatch.setattr(triton_codes, "device_code", lambda: code)
    monkeypatch.setattr(kernel_map, "_map_code", lambda: code)
    return told


NAMES = ("gates", "gate_stride", "marks", "marks_b", "marked_columns", "fresh_marks", "fresh_marks_b")


def test_decode_never_waits_and_takes_gates_as_they_are(monkeypatch):
    told = kernels_that_tell(("attend", "attend_codes", "combine", "turn", "weigh"), monkeypatch)
    coded = packed_codes([[40, 3], [0, 9]], RowFormat(8, 4), 16, 16).view()
    views = [absent(filled([[0, 3], [5, 5]], 16, 16).view()), replace(absent(coded), coding=absent(coded.coding))]
    rows = [strided(*shape).to("meta") for shape in [(2, 2, 3, 2, 16), (2, 2, 2, 16), (2, 2, 2, 16)]]
    gates = torch.empty(1, 2, 3, 1, device="meta").expand(2, -1, -1, 2)
    marks = replace(absent(some_marks(2, 2, 3, 2, 50, 2)), gates=gates)
    for given in (marks, replace(marks, fresh=None), None):
        request = DecodeRequest(rows[0], views, *rows[1:], None, LogitOptions(0.3), given is None, given)
        kernels.ragged_decode(request)
    step = ["attend", "turn", "attend_codes", "combine"]
    assert [name for name, _ in told] == [*step * 3, "weigh"]
    attends = [named for name, named in told if name.startswith("attend")]
    for named in attends[:4]:
        assert named["gates"] is gates
        assert named["gate_stride"] == gates.stride() == (0, 3, 1, 0)
        assert named["marks"] is marks.columns
        assert named["marked_columns"] == 50
    # What is None compiles to nothing.
    assert [named["fresh_marks"] is None for named in attends[::2]] == [False, True, True]
    assert {named.get(name) for named in attends[4:] for name in NAMES} == {None}


def test_columns_of_maps_never_wait(monkeypatch):
    told = kernels_that_tell(("row_sums", "column_sums"), monkeypatch)
    map, _ = marked_map(torch.float32, "plain", masked=False, sampled=False, expanded=True)
    marks, positions = absent(map.marks), torch.arange(100).expand(2, -1).to("meta")
    weights, widths = torch.ones(2, 70, device="meta"), torch.ones(2, 2, device="meta").long()
    for given in (marks, None):
        own = replace(absent(map), marks=given)
        kernels.column_mass(MassRequest(own, weights, positions, widths))
        kernel_map.column_max(own)
    assert [name for name, _ in told] == ["row_sums", "column_sums"] * 4
    for _, named in told[:4]:
        assert named["gates"] is marks.gates
        assert named["marks"] is marks.columns
    assert {named[name] for _, named in told[4:] for name in NAMES[:4]} == {None}
