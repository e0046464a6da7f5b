"""Triton device code for pages of codes: queries, codes and their steps -> attention, split by split.

Written like `device_pages` beside it, which explains the conventions. A row is the product of the numbers that
its codes stand for with a transposed rotation. So not the rows are turned but the queries, once, and the outputs, when
all splits are merged; in between, codes become numbers in registers, and memory sees nothing but codes.

With 4 bits a byte holds the codes of two channels, half a head apart: such rows are two tiles of half the width.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from headwise.kernels.triton.device_tiles import (
    absorb,
    addresses,
    biased,
    capped,
    gates_of,
    looked_up,
    marked,
    note,
    products_of,
    put,
    record,
    soften,
    tile,
)


@triton.jit(do_not_specialize=["queries"])
@no_type_check
def turn(
    query, hadamard, turned, query_stride, heads, queries, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """One member's query, times the matrix that keys were multiplied with."""
    own = tl.program_id(0).to(tl.int64)
    members = GROUP * queries
    head = own // members
    member = own % members
    feature = tl.arange(0, BLOCK_D)
    held = feature < D
    query += head // heads * query_stride[0] + head % heads * query_stride[1]
    query += member // queries * query_stride[2] + member % queries * query_stride[3]
    q = tl.load(query + feature, mask=held, other=0.0).to(tl.float32)
    product = tl.sum(q[:, None] * tile(hadamard, feature, D, held, feature, D), 0)
    tl.store(turned + own * D + feature, product, mask=held)


@triton.jit
@no_type_check
def numbers(codes, steps, address, held, channel, WIDTH: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr, dtype):
    """The numbers that codes of some channels stand for.

    Args:
        SIZE: channels in a group.
    """
    if GROUPS == 1:
        # Both in one word, which can be fetched ahead as less than that cannot.
        pair = tl.load(steps + address, mask=held, other=0)[:, None]
        step = pair.to(tl.int16).to(tl.float16, bitcast=True)
        least = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    else:
        row = steps + address[:, None] * (2 * GROUPS) + (channel // SIZE)[None, :]
        there = held[:, None] & (channel < WIDTH)[None, :]
        step = tl.load(row, mask=there, other=0.0)
        least = tl.load(row + GROUPS, mask=there, other=0.0)
    exact = codes.to(dtype)
    if dtype == tl.float16:
        # The same without a conversion, which the hardware is slow at: the bits of 1024 + c are those of 1024 and of c.
        exact = (codes.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True) - 1024
    return exact * step.to(dtype) + least.to(dtype)


@triton.jit
@no_type_check
def decoded(
    pool,
    steps,
    address,
    held,
    byte,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    NARROW: tl.constexpr,
):
    """Rows of WIDTH channels as numbers, gathered by address: with 4 bits each half by itself, else one is both.

    In fp16, as that is what steps are in, whatever the model's dtype: it rounds less than the codes did.
    """
    dtype: tl.constexpr = tl.float16 if NARROW else tl.float32
    SIZE: tl.constexpr = WIDTH // GROUPS
    if BITS == 4:
        HALF: tl.constexpr = WIDTH // 2
        codes = tile(pool, address, HALF, held, byte, HALF)
        low = numbers(codes & 15, steps, address, held, byte, WIDTH, SIZE, GROUPS, dtype)
        high = numbers(codes >> 4, steps, address, held, HALF + byte, WIDTH, SIZE, GROUPS, dtype)
    else:
        codes = tile(pool, address, WIDTH, held, byte, WIDTH)
        low = numbers(codes, steps, address, held, byte, WIDTH, SIZE, GROUPS, dtype)
        high = low
    return low, high


@triton.jit(
    do_not_specialize=[
        *("mask", "mask_b", "mask_q", "queries", "fresh", "parts", "kept", "views"),
        *("gates", "marks", "marks_b", "marked_columns", "first", "split_rows", "begin", "view", "pages"),
    ]
)
@no_type_check
def attend_codes(
    turned,
    key_pool,
    value_pool,
    key_steps,
    value_steps,
    column_pool,
    bias_pool,
    table,
    lengths,
    mask,
    gates,
    marks,
    partial,
    partial_lse,
    logits,
    spans,
    length_stride,
    mask_b,
    mask_q,
    gate_stride,
    marks_b,
    marked_columns,
    heads,
    queries,
    fresh,
    parts,
    kept,
    views,
    first,
    split_rows,
    begin,
    view,
    pages,
    inner,
    outer,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    KEY_GROUPS: tl.constexpr,
    VALUE_GROUPS: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    NARROW: tl.constexpr,
):
    """Attention of a block of a head's members over one split of its rows in one view of codes.

    Writes what `triton_device.attend` writes; the output is not turned back yet.

    Args:
        marked_columns: how many columns have marks, from the first on.
        first: part that the view's first split is.
        begin: rows of the views before this one, each padded to its longest head.
        pages: entries of the table per head.
        BLOCK_D, BLOCK_E: bytes.
    """
    KEY_BYTES: tl.constexpr = D * KEY_BITS // 8
    VALUE_BYTES: tl.constexpr = E * VALUE_BITS // 8
    head = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    b = head // heads
    h = head % heads
    members = GROUP * queries
    member = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    asks = member < members
    place = (head * parts + first + split) * members + member
    length = tl.load(lengths + b * length_stride[0] + h * length_stride[1]).to(tl.int32)
    if spans is not None:
        record(spans + (head * views + view) * 2, split, begin, length)
    start = split * split_rows
    stop = tl.minimum(start + split_rows, length)
    if start >= stop:
        tl.store(partial_lse + place, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=asks)
        return

    key_byte = tl.arange(0, BLOCK_D)
    value_byte = tl.arange(0, BLOCK_E)
    own = head * members + member
    q = tile(turned, own, D, asks, key_byte, KEY_BYTES)
    q_high = q
    if KEY_BITS == 4:
        q_high = tile(turned + KEY_BYTES, own, D, asks, key_byte, KEY_BYTES)
    i = (member % queries).to(tl.int64)
    if mask is not None:
        mask += b * mask_b
    if marks is not None:
        marks += b * marks_b
    gate = gates_of(gates, gate_stride, b, h, member // queries, i, asks)
    of_logits = own[:, None] * (kept + fresh) + begin
    top, total = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    output = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    output_high = output

    for at in range(start, stop, BLOCK_N):
        n = at + tl.arange(0, BLOCK_N)
        held = n < stop
        address = addresses(table + head * pages, n, held, PAGE)
        k, k_high = decoded(key_pool, key_steps, address, held, key_byte, D, KEY_BITS, KEY_GROUPS, NARROW)
        v, v_high = decoded(value_pool, value_steps, address, held, value_byte, E, VALUE_BITS, VALUE_GROUPS, NARROW)
        products = products_of(q, k, NARROW)
        if KEY_BITS == 4:
            products += products_of(q_high, k_high, NARROW)
        visible, column = looked_up(column_pool, address, held, asks, i, mask, mask_q)
        x = biased(capped(products, inner, outer), bias_pool, address, held)
        x = tl.where(visible, marked(x, gate, marks, column, marked_columns), float("-inf"))
        note(logits, of_logits + n[None, :], x, asks, held)
        top, total, weights, decay = soften(x, top, total)
        output = absorb(output, decay, weights, v, NARROW)
        if VALUE_BITS == 4:
            output_high = absorb(output_high, decay, weights, v_high, NARROW)

    some = tl.where(total > 0, total, 1.0)
    tl.store(partial_lse + place, top + tl.log2(some), mask=asks)
    put(partial, place, E, asks, value_byte, VALUE_BYTES, output / some[:, None])
    if VALUE_BITS == 4:
        put(partial + VALUE_BYTES, place, E, asks, value_byte, VALUE_BYTES, output_high / some[:, None])
