"""Marks of columns, and gates of queries, in the kernels: against the equations, and the compiled kernels too."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from cases import pairwise
from cpu_inputs import CPU, DTYPES, THREADS, VECTORS, check, threads, vectors
from headwise.errors import InputError
from headwise.kernels import attention, reference
from headwise.kernels.attention import dense_attention
from headwise.kernels.backends import choose
from headwise.kernels.cpu import backend as cpu
from headwise.kernels.interface import AttentionMap, DecodeRequest, Marks, MassRequest, PeaksRequest
from headwise.quant.formats import RowFormat
from headwise.types import LogitOptions
from kernel_inputs import packed, packed_codes

__all__ = ["threads", "vectors"]

ALPHA = 0.01


def marked_request(
    store, coded=(), *, group=3, queries=1, fresh=1, marked=40, with_fresh=False, masked=False, **options
):
    """Over exact rows and views of codes; of the heads some have no gate, and of the columns some no mark."""
    (batch, heads), dtype = store.lengths.shape, store.pools["keys"].dtype
    key_dim, value_dim = store.pools["keys"].shape[-1], store.pools["values"].shape[-1]
    query = torch.randn(batch, heads, queries, group, key_dim).to(dtype).transpose(2, 3)
    rows = (torch.randn(batch, heads, fresh, dim).to(dtype) for dim in (key_dim, value_dim))
    gates = (torch.randn(batch, heads, group, queries) * (torch.rand(batch, heads, group, 1) < 0.6)).float()
    columns = torch.randn(batch, marked) * (torch.rand(batch, marked) < 0.5)
    marks = Marks(gates, columns, torch.randn(batch, fresh) if with_fresh else None)
    views = [store.view(), *coded]
    mask = None
    if masked:
        mask = torch.rand(batch, queries, 2 * max(view.longest for view in views) + fresh) < 0.7
    sinks = torch.randn(heads, group) if options.get("sinks") else None
    logits = LogitOptions(key_dim**-0.5, options.get("softcap"), sinks)
    return DecodeRequest(query, views, *rows, mask, logits, True, marks)


@pairwise(
    rows=[(1, 1), (3, 3), (2, 5), (7, 130)],
    marked=[0, 13, 40, 1000],
    with_fresh=[False, True],
    masked=[False, True],
    kind=["plain", "softcap", "sinks", "biased"],
    dtype=DTYPES,
    **THREADS,
)
def test_decode(rows, marked, with_fresh, masked, kind, dtype, threads):
    store = packed([[0, 50, 7], [200, 33, 1]], dtype=dtype, biased=kind == "biased")
    sizes = {"queries": rows[0], "fresh": rows[1], "marked": marked, "with_fresh": with_fresh, "masked": masked}
    request = marked_request(store, softcap=2.0 if kind == "softcap" else None, sinks=kind == "sinks", **sizes)
    expected, found = (each.ragged_decode(request) for each in (reference, cpu))
    check(expected, found)
    plain = reference.ragged_decode(replace(request, marks=None))
    assert marked == 0 or not torch.allclose(plain.lse, expected.lse)


@pairwise(format=[RowFormat(8, 8), RowFormat(4, 4), RowFormat(8, 4)], masked=[False, True], **THREADS)
def test_decode_over_codes(format, masked, threads):
    coded = packed_codes([[131, 0, 7], [64, 30, 1]], format)
    check(*(each.ragged_decode(marked_once(coded, masked)) for each in (reference, cpu)), coded=True)


def marked_once(coded, masked):
    torch.manual_seed(5)
    return marked_request(
        packed([[0, 5, 33], [70, 0, 1]]), [coded.view()], queries=2, fresh=3, marked=90, masked=masked
    )


@pairwise(**VECTORS)
def test_a_head_without_a_gate_is_what_it_is_without_marks(vectors):
    request = marked_request(packed([[70, 9], [33, 50]]), queries=2, fresh=2, with_fresh=True)
    found, plain = cpu.ragged_decode(request), cpu.ragged_decode(replace(request, marks=None))
    without = (request.marks.gates == 0).all(dim=3)
    assert without.any() and not without.all()
    assert torch.equal(found.output[without], plain.output[without])
    assert not torch.equal(found.output[~without], plain.output[~without])


def scaled_attention(query, keys, values, scaled, options):
    """Equation 2 of the paper in double precision: of one head, the scaled columns by alpha, and all made one again.

    PASTA (Zhang et al., ICLR 2024).
    """
    attention = (query.double() @ keys.double().T * options.scaling).softmax(dim=-1)
    changed = attention * torch.where(scaled, ALPHA, 1.0)
    return changed / changed.sum(dim=-1, keepdim=True) @ values.double()


@pytest.mark.shapes
@pytest.mark.parametrize("kernel", ["reference", "cpu"])
def test_three_exact_ways_and_the_equation(kernel):
    """Two sequences, four query and two KV heads, some of them steered, generated columns not scaled."""
    torch.manual_seed(0)
    kernels, lengths, prompt = choose(kernel, CPU), 23, 30
    store = packed([[lengths, lengths], [lengths, lengths]], 8, 6)
    options, scaled = LogitOptions(0.4), torch.rand(2, prompt) < 0.6
    gates = torch.tensor([[1.0, 0], [1, 1]])[None, :, :, None].expand(2, -1, -1, 1)
    query, keys, values = torch.randn(2, 2, 2, 1, 8), torch.randn(2, 2, 1, 8), torch.randn(2, 2, 1, 6)
    marks = Marks(gates, torch.where(scaled, math.log(ALPHA), 0.0))
    request = DecodeRequest(query, [store.view()], keys, values, None, options, marks=marks)
    found = kernels.ragged_decode(request).output
    rows = store.rows()
    columns = rows.columns.long()
    assert (columns >= prompt).any()
    for b, h, g in torch.cartesian_prod(*[torch.arange(2)] * 3).tolist():
        all_keys, all_values = torch.cat([rows.keys[b, h], keys[b, h]]), torch.cat([rows.values[b, h], values[b, h]])
        own = scaled[b].gather(0, columns[b, h].clamp(max=prompt - 1)) & (columns[b, h] < prompt)
        own = torch.cat([own, torch.tensor([False])]) & (gates[b, h, g] != 0)
        asked = query[b, h, g]
        expected = scaled_attention(asked, all_keys, all_values, own, options)
        torch.testing.assert_close(found[b, h, g].double(), expected, atol=1e-5, rtol=1e-5)
        # An additive mask.
        logits = asked @ all_keys.T * options.scaling + torch.where(own, math.log(ALPHA), 0.0)
        torch.testing.assert_close(found[b, h, g], logits.softmax(-1) @ all_values, atol=1e-5, rtol=1e-5)
        # Two partial attentions, merged by their denominators.
        parts = [attention_of(asked, all_keys[part], all_values[part], options) for part in (own, ~own)]
        lse = torch.stack([parts[0][1] + math.log(ALPHA), parts[1][1]])
        shares = (lse - lse.logsumexp(0)).exp()
        merged = sum(share[:, None] * part[0] for share, part in zip(shares, parts, strict=True))
        torch.testing.assert_close(found[b, h, g], merged, atol=1e-5, rtol=1e-5)
        # One channel more.
        wide = torch.cat([asked, torch.tensor([[1.0]])], dim=-1)
        more = torch.where(own, math.log(ALPHA) / options.scaling, 0.0)[:, None]
        output, _ = attention_of(wide, torch.cat([all_keys, more], dim=-1), all_values, options)
        torch.testing.assert_close(found[b, h, g], output, atol=1e-5, rtol=1e-5)


def attention_of(query, keys, values, options):
    """Output and denominator; nothing of no rows."""
    logits = query @ keys.T * options.scaling
    if not keys.numel():
        return query.new_zeros(len(query), values.shape[-1]), query.new_full((len(query),), -torch.inf)
    return logits.softmax(-1) @ values, logits.logsumexp(-1)


def marked_map(dtype=torch.float32, *, queries, total, pads=(0, 0), group=3, options=None, columns=None):
    query, keys = torch.randn(2, 2, group, queries, 24).to(dtype), torch.randn(2, 2, total, 24).to(dtype)
    own = torch.arange(total - queries, total) if columns is None else columns
    real, mask = torch.arange(total)[None] >= torch.tensor(pads)[:, None], None
    if any(pads):
        mask = real[:, None] & (torch.arange(total)[None, None] <= own[:, None])
    gates = torch.randn(1, 2, group, 1) * (torch.rand(1, 2, group, 1) < 0.6)
    marks = Marks(gates.expand(2, -1, -1, queries), torch.randn(2, total) * (torch.rand(2, total) < 0.5))
    return AttentionMap(query, keys, mask, options or LogitOptions(0.3), columns, marks), real


KINDS = {"plain": {}, "softcap": {"softcap": 2.0}, "sinks": {"sinks": torch.tensor([[0.3, -1, 2], [0.5, 1, 0]])}}


@pairwise(pads=[(0, 0), (0, 29)], queries=[1, 40, 83], kind=list(KINDS), dtype=DTYPES, **THREADS)
def test_column_mass(pads, queries, kind, dtype, threads, monkeypatch):
    columns = torch.sort(torch.randperm(83)[:queries]).values
    options = LogitOptions(0.3, **KINDS[kind])
    map, real = marked_map(dtype, queries=queries, total=83, pads=pads, options=options, columns=columns)
    weights, positions = torch.rand(2, queries) * real[:, columns], (real.cumsum(1) - 1).clamp(min=0)
    request = MassRequest(map, weights, positions, torch.tensor([[20, 7], [200, 200]]))
    expected = reference.column_mass(request)
    for block in (2**20, 700):
        monkeypatch.setattr("headwise.kernels.attention._BLOCK_LOGITS", block)
        for mine, its in zip(cpu.column_mass(request), expected, strict=True):
            torch.testing.assert_close(mine, its, atol=2e-5, rtol=2e-5)
    plain = reference.column_mass(replace(request, map=replace(map, marks=None)))
    assert not torch.allclose(plain[0], expected[0])


@pairwise(pads=[(0, 0), (0, 50)], queries=[1, 40, 83], kind=list(KINDS), dtype=DTYPES, **THREADS)
def test_attention_and_peaks(pads, queries, kind, dtype, threads):
    map, _ = marked_map(dtype, queries=queries, total=83, pads=pads, options=LogitOptions(0.3, **KINDS[kind]))
    counted = [slice(0, 4), slice(9, 30), slice(83 - queries, 83)] if queries < 50 else [slice(0, 83)]
    request = PeaksRequest(map, torch.randn(2, 2, 83, 15).to(dtype), counted)
    expected, found = reference.attention_and_peaks(request), cpu.attention_and_peaks(request)
    rounding = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(found[0], expected[0], atol=rounding, rtol=rounding)
    torch.testing.assert_close(found[1], expected[1], atol=2e-5, rtol=2e-5)


@pairwise(pads=[(0, 0), (0, 29)], queries=[1, 40, 83], kind=list(KINDS), dtype=DTYPES, gated=["some", "all", "none"])
def test_dense_attention(pads, queries, kind, dtype, gated, monkeypatch):
    """Against all logits at once, in double precision."""
    monkeypatch.setattr(attention, "_MARKED_ROWS", (7, 7))
    options = LogitOptions(0.3, **KINDS[kind])
    map, real = marked_map(dtype, queries=queries, total=83, pads=pads, options=options)
    gates = {"some": map.marks.gates, "all": map.marks.gates + 5, "none": map.marks.gates * 0}[gated]
    map, values = replace(map, marks=replace(map.marks, gates=gates)), torch.randn(2, 2, 83, 15).to(dtype)
    found = dense_attention(map, values)
    logits = torch.einsum("bhgqd,bhtd->bhgqt", map.query.double(), map.keys.double()) * 0.3
    if options.softcap:
        logits = torch.tanh(logits / options.softcap) * options.softcap
    logits += gates[..., None] * map.marks.columns[:, None, None, None]
    visible = torch.arange(83) <= torch.arange(83 - queries, 83)[:, None]
    logits = logits.masked_fill(~(visible & real[:, None])[:, None, None], -torch.inf)
    if options.sinks is not None:
        logits = torch.cat([logits, options.sinks[None, :, :, None, None].expand(*logits.shape[:-1], 1)], dim=-1)
    weights = logits.softmax(-1)[..., :83]
    expected = torch.einsum("bhgqt,bhte->bhgqe", weights, values.double())
    counts = real[:, -queries:][:, None, None, :, None].expand_as(expected)
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(found.double()[counts], expected[counts], atol=rounding, rtol=rounding)
    assert found.isfinite().all()


def test_marks_that_do_not_fit_are_refused():
    request = marked_request(packed([[5, 9]]), fresh=2, with_fresh=True)
    for wrong in (
        {"gates": request.marks.gates[:, :1]},
        {"gates": request.marks.gates.double()},
        {"columns": request.marks.columns[0]},
        {"fresh": request.marks.fresh[:, :1]},
    ):
        with pytest.raises(InputError, match=r"marks: expected gates \[b, h, g, q\]"):
            cpu.ragged_decode(replace(request, marks=replace(request.marks, **wrong)))
    bare = [replace(view, columns=None) for view in request.pages]
    with pytest.raises(InputError, match="a mask or marks were given, and the pages say no columns"):
        cpu.ragged_decode(replace(request, pages=bare))
    map, _ = marked_map(queries=3, total=9)
    short = replace(map, marks=replace(map.marks, columns=map.marks.columns[:, :8]))
    with pytest.raises(InputError, match="of a map of all its columns"):
        cpu.column_mass(MassRequest(short, torch.ones(2, 3), torch.arange(9).expand(2, -1), torch.zeros(0, 2).long()))
