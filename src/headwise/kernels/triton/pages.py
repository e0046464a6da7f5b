"""Triton for pages: requests over a layer's pages -> launches that attend to them and write new rows, on a GPU.

Decoding follows FlashAttention-2 (Dao 2023) inside a program and Flash-Decoding (Dao et al. 2023) between programs:
the kept rows of a head are split, each split makes a softmax of its own, and a second launch merges them. Nothing
waits for the device: grids and scratch follow from shapes and `PageView.longest` alone, so that a decode step can be
captured into a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from headwise.kernels.check import check_append, check_decode
from headwise.kernels.interface import AppendRequest, Decoded, DecodeRequest, PageView
from headwise.kernels.triton.codes import attend_codes, hadamard_of, turning
from headwise.kernels.triton.launch import (
    LAUNCH,
    dense_rows,
    device_code,
    factors,
    is_narrow,
    on_device,
    strides,
    told_of,
)
from headwise.kernels.triton.tiles import append_tiles, cut_into_splits, tiles_of_view
from headwise.types import Tensor


@dataclass(frozen=True)
class _Plan:
    """How a decode step is cut into programs; from shapes alone.

    Attributes:
        coded: views of codes that hold anything.
        tiles, cuts: of the exact view, then of the coded ones; a cut is how many splits, and of how many rows each.
        parts: the splits of the exact rows, the fresh rows, and the splits of each view of codes.
        kept: rows of all views, each padded to its longest head.
    """

    request: DecodeRequest
    coded: list[PageView]
    narrow: bool
    tiles: list[dict[str, int]]
    cuts: list[tuple[int, int]]

    @classmethod
    def of(cls, request: DecodeRequest) -> _Plan:
        exact, coded = request.pages[0], [view for view in request.pages[1:] if view.longest]
        batch, heads, group, queries, _ = request.query.shape
        narrow = is_narrow(request.query, exact.keys, exact.values, request.fresh_keys, request.fresh_values)
        tiles = [tiles_of_view(request, view, narrow) for view in (exact, *coded)]
        cuts = []
        for view, sizes in zip((exact, *coded), tiles, strict=True):
            programs = batch * heads * -(-group * queries // sizes["BLOCK_M"])
            cuts.append(cut_into_splits(view.longest, programs, sizes["BLOCK_N"], request.query.device))
        return cls(request, coded, narrow, tiles, cuts)

    @property
    def parts(self) -> int:
        return 1 + sum(count for count, _ in self.cuts)

    @property
    def kept(self) -> int:
        return self.request.pages[0].longest + sum(view.longest for view in self.coded)


@dataclass(frozen=True)
class _Scratch:
    """What the launches of a step leave to one another."""

    partial: Tensor
    partial_lse: Tensor
    logits: Tensor | None = None
    spans: Tensor | None = None

    @classmethod
    def of(cls, plan: _Plan) -> _Scratch:
        request = plan.request
        batch, heads, group, queries, _ = request.query.shape
        fresh, value_dim = request.fresh_values.shape[2:]
        each, members, device = batch * heads, group * queries, request.query.device
        partial = torch.empty(each, plan.parts, members, value_dim, dtype=torch.float32, device=device)
        lse = torch.empty(each, plan.parts, members, dtype=torch.float32, device=device)
        if not request.with_mass:
            return cls(partial, lse)
        logits = torch.empty(each, members, plan.kept + fresh, dtype=torch.float32, device=device)
        spans = torch.empty(each, 1 + len(plan.coded), 2, dtype=torch.int32, device=device)
        return cls(partial, lse, logits, spans)


def ragged_decode(request: DecodeRequest) -> Decoded:
    """As `reference.ragged_decode`."""
    check_decode(request)
    request = replace(
        request,
        query=dense_rows(request.query),
        fresh_keys=dense_rows(request.fresh_keys),
        fresh_values=dense_rows(request.fresh_values),
        mask=None if request.mask is None else dense_rows(request.mask),
    )
    plan = _Plan.of(request)
    scratch, query = _Scratch.of(plan), request.query
    batch, heads, group, queries, _ = query.shape
    fresh, value_dim = request.fresh_values.shape[2:]
    output = torch.empty(*query.shape[:-1], value_dim, dtype=request.fresh_values.dtype, device=query.device)
    lse = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
    sinks = None if request.options.sinks is None else request.options.sinks.contiguous()
    with on_device(query.device):
        _attend(plan, scratch)
        device_code().combine[(lse.numel(),)](
            scratch.partial,
            scratch.partial_lse,
            sinks,
            hadamard_of(plan.coded, "value_hadamard"),
            output,
            lse,
            heads,
            queries,
            plan.parts,
            plan.cuts[0][0] + 1,
            GROUP=group,
            E=value_dim,
            BLOCK_E=plan.tiles[0]["BLOCK_E"],
            BLOCK_S=32,
            **(turning(value_dim) if plan.coded else LAUNCH),
        )
        if scratch.logits is None:
            return Decoded(output, lse, None, None)
        mass = torch.empty(batch, heads, queries, plan.kept + fresh, dtype=torch.float32, device=query.device)
        sizes = {"GROUP": group, "BLOCK_N": 512, **LAUNCH}
        device_code().weigh[batch * heads * queries, -(-mass.shape[-1] // 512)](
            scratch.logits, lse, scratch.spans, mass, queries, plan.kept, fresh, 1 + len(plan.coded), **sizes
        )
    return Decoded(output, lse, mass[..., : plan.kept], mass[..., plan.kept :])


def _attend(plan: _Plan, scratch: _Scratch) -> None:
    """Every split by itself: of the exact rows, of the fresh ones, and of each view of codes."""
    request, exact = plan.request, plan.request.pages[0]
    query, mask, marks = request.query, request.mask, request.marks
    batch, heads, group, queries, _ = query.shape
    fresh = request.fresh_keys.shape[2]
    (splits, split_rows), tiles = plan.cuts[0], plan.tiles[0]
    mask_b, mask_q = strides(mask)
    inner, outer = factors(request.options)
    fresh_marks = None if marks is None or marks.fresh is None else dense_rows(marks.fresh)
    every = {
        **vars(scratch),
        **told_of(marks),
        "marked_columns": None if marks is None else marks.columns.shape[1],
        "mask": mask,
        "mask_b": mask_b,
        "mask_q": mask_q,
        "heads": heads,
        "queries": queries,
        "fresh": fresh,
        "parts": plan.parts,
        "kept": plan.kept,
        "views": 1 + len(plan.coded),
        "inner": inner,
        "outer": outer,
        "GROUP": group,
    }
    table = exact.table.contiguous()
    device_code().attend[batch * heads, splits + 1, -(-group * queries // tiles["BLOCK_M"])](
        query,
        exact.keys,
        exact.values,
        exact.columns,
        exact.biases,
        table,
        exact.lengths,
        request.fresh_keys,
        request.fresh_values,
        query_stride=query.stride(),
        length_stride=exact.lengths.stride(),
        key_stride=request.fresh_keys.stride(),
        value_stride=request.fresh_values.stride(),
        fresh_marks=fresh_marks,
        fresh_marks_b=None if fresh_marks is None else fresh_marks.stride(0),
        unseen=0 if mask is None else mask.shape[2] - fresh,
        splits=splits,
        split_rows=split_rows,
        pages=table.shape[2],
        PAGE=exact.page_size,
        KEY_STRIDES=exact.keys.stride(),
        VALUE_STRIDES=exact.values.stride(),
        NARROW=plan.narrow,
        **tiles,
        **every,
    )
    attend_codes(query, plan.coded, plan.tiles[1:], plan.cuts[1:], splits + 1, exact.longest, every)


def append(request: AppendRequest) -> None:
    """As `reference.append`."""
    check_append(request)
    exact, *coded = zip(request.pages, request.increments_by_view(), strict=True)
    for view, increments in coded:
        # Rows that are codes take in none: there are only the increments.
        if increments is not None:
            heads = increments.shape[:2]
            keys, values = (pool.new_empty(*heads, 0, pool.shape[-1]) for pool in (view.keys, view.values))
            scores = increments.new_empty(*heads, 0)
            _write(view, AppendRequest((view,), keys, values, request.columns[:0], None, scores, increments))
    view, increments = exact
    _write(view, replace(request, increments=increments))


def _write(pages: PageView, request: AppendRequest) -> None:
    """New rows and increments of one view."""
    batch, heads, fresh, key_dim = request.keys.shape
    assert pages.scores is not None or request.increments is None
    assert pages.scores is None or request.scores is not None
    keys, values, table, real = dense_rows(request.keys), dense_rows(request.values), pages.table, request.real
    scores, increments = (None if one is None else dense_rows(one) for one in (request.scores, request.increments))
    tiles = append_tiles(fresh, key_dim, values.shape[3])
    fresh_blocks = -(-fresh // tiles["BLOCK_F"])
    more = 0 if increments is None else increments.shape[2]
    blocks = fresh_blocks + -(-more // tiles["BLOCK_N"])
    if blocks == 0:
        return
    with on_device(keys.device):
        device_code().write[batch * heads, blocks](
            pages.keys,
            pages.values,
            pages.columns,
            pages.scores,
            pages.biases,
            table.contiguous(),
            pages.lengths,
            keys,
            values,
            request.columns.contiguous(),
            real,
            scores,
            increments,
            pages.lengths.stride(),
            keys.stride(),
            values.stride(),
            *strides(real),
            *strides(scores),
            *strides(increments),
            heads,
            fresh,
            fresh_blocks,
            more,
            table.shape[2],
            PAGE=pages.page_size,
            KEY_STRIDES=pages.keys.stride(),
            VALUE_STRIDES=pages.values.stride(),
            COUNT=blocks == 1,
            **tiles,
        )
    if fresh and blocks > 1:
        pages.lengths.add_(fresh if real is None else real.sum(dim=1, keepdim=True))
