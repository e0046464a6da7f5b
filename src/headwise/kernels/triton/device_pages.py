"""Triton device code for pages: queries, pages and fresh rows -> attention, split by split; new rows -> pages.

Imported only where Triton is there; `headwise.kernels.triton.pages` launches it. Axis letters are those of
`headwise.types`; capitals are known when compiling, `*_stride` is a tuple, and an argument that is None compiles to
nothing. `head` counts the KV heads of all sequences; `member` counts the query rows of a KV head, g * q + i. What
changes from token to token is not specialized on, or it would compile anew.

Logits are in base 2, as exp2 is what the hardware has: the host folds log2(e) into `inner` and `outer`. The decorator
`no_type_check` keeps the functions as they are written where an import hook wraps functions to check shapes.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from headwise.kernels.triton.device_codes import attend_codes, turn
from headwise.kernels.triton.device_tiles import (
    absorb,
    addresses,
    asked,
    biased,
    capped,
    finite,
    gates_of,
    looked_up,
    marked,
    note,
    pooled,
    products_of,
    put,
    record,
    seen_fresh,
    soften,
    tile,
)
from headwise.kernels.triton.device_write import write

__all__ = ["attend", "attend_codes", "combine", "turn", "weigh", "write"]


@triton.jit(
    do_not_specialize=[
        *("mask", "mask_b", "mask_q", "queries", "fresh", "parts", "kept", "views"),
        *("gates", "marks", "fresh_marks", "marks_b", "marked_columns", "fresh_marks_b"),
        *("unseen", "splits", "split_rows", "pages"),
    ]
)
@no_type_check
def attend(
    query,
    key_pool,
    value_pool,
    column_pool,
    bias_pool,
    table,
    lengths,
    keys,
    values,
    mask,
    gates,
    marks,
    fresh_marks,
    partial,
    partial_lse,
    logits,
    spans,
    query_stride,
    length_stride,
    key_stride,
    value_stride,
    mask_b,
    mask_q,
    gate_stride,
    marks_b,
    marked_columns,
    fresh_marks_b,
    heads,
    queries,
    fresh,
    parts,
    kept,
    views,
    unseen,
    splits,
    split_rows,
    pages,
    inner,
    outer,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    PAGE: tl.constexpr,
    KEY_STRIDES: tl.constexpr,
    VALUE_STRIDES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    NARROW: tl.constexpr,
):
    """Attention of a block of a head's members over one split of its exact rows; the last split is the fresh rows.

    Writes the output and the denominator that the split has by itself, and the logits where `weigh` will need them.

    Args:
        spans: for every view of a head, where its logits begin and end.
        marked_columns: how many columns have marks, from the first on.
        parts: splits of all views, and the fresh rows.
        kept: rows of all views, each padded to its longest head.
        unseen: the mask's column of the first fresh row.
        pages: entries of the table per head.
    """
    head, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h = head // heads, head % heads
    members = GROUP * queries
    member = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    asks = member < members
    place = (head * parts + split) * members + member
    length = tl.load(lengths + b * length_stride[0] + h * length_stride[1]).to(tl.int32)
    if spans is not None:
        record(spans + head * views * 2, split, 0, length)
    start = split * split_rows
    stop = tl.minimum(start + split_rows, length)
    if (split < splits) & (start >= stop):
        # `combine` reads no output of a split that saw nothing.
        tl.store(partial_lse + place, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=asks)
        return

    i = (member % queries).to(tl.int64)
    feature, channel = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    q = asked(query + b * query_stride[0] + h * query_stride[1], query_stride, member, queries, asks, feature, D)
    if mask is not None:
        mask += b * mask_b
    if marks is not None:
        marks += b * marks_b
    if fresh_marks is not None:
        fresh_marks += b * fresh_marks_b
    gate = gates_of(gates, gate_stride, b, h, member // queries, i, asks)
    of_logits = (head * members + member)[:, None] * (kept + fresh)
    top, total = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    output = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)

    # The last split begins behind every kept row, so this loop does nothing there; nor does the next one elsewhere.
    for at in range(start, stop, BLOCK_N):
        n = at + tl.arange(0, BLOCK_N)
        held = n < stop
        k = pooled(key_pool, table + head * pages, n, held, feature, D, PAGE, KEY_STRIDES)
        v = pooled(value_pool, table + head * pages, n, held, channel, E, PAGE, VALUE_STRIDES)
        address = addresses(table + head * pages, n, held, PAGE)
        visible, column = looked_up(column_pool, address, held, asks, i, mask, mask_q)
        x = biased(capped(products_of(q, k, NARROW), inner, outer), bias_pool, address, held)
        x = tl.where(visible, marked(x, gate, marks, column, marked_columns), float("-inf"))
        note(logits, of_logits + n[None, :], x, asks, held)
        top, total, weights, decay = soften(x, top, total)
        output = absorb(output, decay, weights, v, NARROW)

    for at in range(0, tl.where(split == splits, fresh, 0), BLOCK_N):
        f = at + tl.arange(0, BLOCK_N)
        held = f < fresh
        k = tile(keys + b * key_stride[0] + h * key_stride[1], f, key_stride[2], held, feature, D)
        v = tile(values + b * value_stride[0] + h * value_stride[1], f, value_stride[2], held, channel, E)
        visible = seen_fresh(mask, mask_q, unseen, f, fresh, i, queries, asks[:, None] & held[None, :])
        x = marked(capped(products_of(q, k, NARROW), inner, outer), gate, fresh_marks, f, fresh)
        x = tl.where(visible, x, float("-inf"))
        note(logits, of_logits + kept + f[None, :], x, asks, held)
        top, total, weights, decay = soften(x, top, total)
        output = absorb(output, decay, weights, v, NARROW)

    some = tl.where(total > 0, total, 1.0)
    tl.store(partial_lse + place, top + tl.log2(some), mask=asks)
    put(partial, place, E, asks, channel, E, output / some[:, None])


@triton.jit(do_not_specialize=["queries", "parts", "straight"])
@no_type_check
def combine(
    partial,
    partial_lse,
    sinks,
    hadamard,
    output,
    lse,
    heads,
    queries,
    parts,
    straight,
    GROUP: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Merge the splits of one member, and its sink logit, into its output and its natural log-sum-exp.

    Args:
        straight: parts whose output is as it should be; that of the others is still to be turned back.
    """
    own = tl.program_id(0).to(tl.int64)
    members = GROUP * queries
    head = own // members
    member = own % members
    channel = tl.arange(0, BLOCK_E)
    top = tl.full([1], float("-inf"), tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + head % heads * GROUP + member // queries).to(tl.float32)
        top = tl.zeros([1], tl.float32) + sink * 1.4426950408889634
    total = tl.where(top > float("-inf"), 1.0, 0.0)
    merged = tl.zeros([BLOCK_E], tl.float32)
    turned = merged
    for at in range(0, parts, BLOCK_S):
        part = at + tl.arange(0, BLOCK_S)
        place = (head * parts + part) * members + member
        share = tl.load(partial_lse + place, mask=part < parts, other=float("-inf"))
        values = tile(partial, place, E, share > float("-inf"), channel, E)
        raised = tl.maximum(top, tl.max(share, 0))
        base = finite(raised)
        weights = tl.exp2(share - base)
        decay = tl.exp2(top - base)
        total = total * decay + tl.sum(weights, 0)
        if hadamard is None:
            merged = merged * decay + tl.sum(weights[:, None] * values, 0)
        else:
            merged = merged * decay + tl.sum(tl.where(part < straight, weights, 0.0)[:, None] * values, 0)
            turned = turned * decay + tl.sum(tl.where(part < straight, 0.0, weights)[:, None] * values, 0)
        top = raised
    if hadamard is not None:
        merged += tl.sum(tile(hadamard, channel, E, channel < E, channel, E) * turned[None, :], 1)
    some = tl.where(total > 0, total, 1.0)
    tl.store(output + own * E + channel, merged / some, mask=channel < E)
    tl.store(lse + own + tl.arange(0, 1), (top + tl.log2(some)) * 0.6931471805599453)


@triton.jit(do_not_specialize=["queries", "kept", "fresh", "views"])
@no_type_check
def weigh(logits, lse, spans, mass, queries, kept, fresh, views, GROUP: tl.constexpr, BLOCK_N: tl.constexpr):
    """Probabilities of one query over a block of rows, the kept and then the fresh ones, summed over the group."""
    pair = tl.program_id(0).to(tl.int64)
    head = pair // queries
    width = kept + fresh
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Nobody has written a logit between a head's last row in a view and the next view, or the fresh rows.
    there = (n >= kept) & (n < width)
    for view in range(views):
        span = spans + (head * views + view) * 2
        there = there | ((n >= tl.load(span)) & (n < tl.load(span + 1)))
    received = tl.zeros([BLOCK_N], tl.float32)
    for g in tl.static_range(GROUP):
        own = (head * GROUP + g) * queries + pair % queries
        base = finite(tl.load(lse + own)) * 1.4426950408889634
        received += tl.exp2(tl.load(logits + own * width + n, mask=there, other=float("-inf")) - base)
    tl.store(mass + pair * width + n, received, mask=n < width)
