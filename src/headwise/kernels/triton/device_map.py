"""Triton device code for the attention map: queries and keys of a prompt -> row sums, and from them column sums.

Written like `device_pages` beside it, which explains the conventions. Here `member` counts the query heads of
all sequences.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from headwise.kernels.triton.device_tiles import capped, finite, gates_of, lane_of, marked, seen, tile


@triton.jit
@no_type_check
def products_of(
    of_rows,
    of_columns,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NARROW: tl.constexpr,
):
    """Products of many queries with many keys, summed in fp32 over BLOCK_D features at a time.

    Args:
        of_rows, of_columns: where the matrix begins, which rows of it, how far apart they lie, and which are there.
    """
    products = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in tl.static_range(0, D, BLOCK_D):
        feature = first + tl.arange(0, BLOCK_D)
        q = tile(of_rows[0], of_rows[1], of_rows[2], of_rows[3], feature, D)
        k = tile(of_columns[0], of_columns[1], of_columns[2], of_columns[3], feature, D)
        if NARROW:
            products = tl.dot(q, tl.trans(k), products)
        else:
            products = tl.dot(q.to(tl.float32), tl.trans(k.to(tl.float32)), products, input_precision="ieee")
    return products


@triton.jit(do_not_specialize=["mask", "mask_b", "mask_q", "gates", "marks", "marks_b", "rows", "total"])
@no_type_check
def row_sums(
    query,
    keys,
    columns,
    mask,
    sinks,
    lse,
    query_stride,
    key_stride,
    mask_b,
    mask_q,
    heads,
    rows,
    total,
    inner,
    outer,
    gates,
    gate_stride,
    marks,
    marks_b,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NARROW: tl.constexpr,
):
    """Log-sum-exp, in base 2, of a block of rows of one query head's map; the sink logit is in it."""
    # The last rows see the most: they go first, so that no long program is left over at the end.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    member = tl.program_id(1).to(tl.int64)
    b, h, g = lane_of(member, heads, GROUP)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = row < rows
    of_query = query + b * query_stride[0] + h * query_stride[1] + g * query_stride[2]
    of_keys = keys + b * key_stride[0] + h * key_stride[1]
    own = tl.load(columns + row, mask=is_row, other=0).to(tl.int32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if sinks is not None:
        top = tl.zeros([BLOCK_M], tl.float32) + tl.load(sinks + h * GROUP + g).to(tl.float32) * 1.4426950408889634
    sums = tl.where(top > float("-inf"), 1.0, 0.0)
    if mask is None:
        limit = tl.max(own, 0) + 1
    else:
        mask += b * mask_b
        limit = total
    if marks is not None:
        marks += b * marks_b
    gate = gates_of(gates, gate_stride, b, h, g, row, is_row)
    for at in range(0, limit, BLOCK_N):
        t = at + tl.arange(0, BLOCK_N)
        held = t < total
        visible = is_row[:, None] & held[None, :]
        if mask is None:
            visible &= t[None, :] <= own[:, None]
        else:
            visible = seen(mask, row, t, mask_q, visible)
        of_rows, of_columns = (of_query, row, query_stride[3], is_row), (of_keys, t, key_stride[2], held)
        products = products_of(of_rows, of_columns, D, BLOCK_M, BLOCK_N, BLOCK_D, NARROW)
        x = marked(capped(products, inner, outer), gate, marks, t, total)
        x = tl.where(visible, x, float("-inf"))
        raised = tl.maximum(top, tl.max(x, 1))
        base = finite(raised)
        sums = sums * tl.exp2(top - base) + tl.sum(tl.exp2(x - base[:, None]), 1)
        top = raised
    tl.store(lse + member * rows + row, top + tl.log2(tl.where(sums > 0, sums, 1.0)), mask=is_row)


@triton.jit(do_not_specialize=["mask", "mask_b", "mask_q", "gates", "marks", "marks_b", "batch", "rows", "total"])
@no_type_check
def column_sums(
    query,
    keys,
    columns,
    mask,
    lse,
    weights,
    row_positions,
    positions,
    widths,
    starts,
    stops,
    mass,
    band,
    query_stride,
    key_stride,
    mask_b,
    mask_q,
    batch,
    heads,
    rows,
    total,
    inner,
    outer,
    gates,
    gate_stride,
    marks,
    marks_b,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NARROW: tl.constexpr,
):
    """Weighted sums over the rows, for a block of columns of one query head's map: in one band, and in total.

    Args:
        weights: of the rows; None for the largest of them instead of their sum, and no band.
        starts: first row that sees a column of each block; None to begin with row 0.
        stops: first row from which on no column of the block is in the band; only for bands that go without the total.
        band: what lies in each band; None where there is none.
    """
    block = tl.program_id(0)
    member = tl.program_id(1).to(tl.int64)
    w = tl.program_id(2)
    b, h, g = lane_of(member, heads, GROUP)
    t = block * BLOCK_N + tl.arange(0, BLOCK_N)
    held = t < total
    of_query = query + b * query_stride[0] + h * query_stride[1] + g * query_stride[2]
    of_keys = keys + b * key_stride[0] + h * key_stride[1]
    start = 0
    if starts is not None:
        start = tl.load(starts + block).to(tl.int32)
    stop = rows
    if stops is not None:
        # The first band shares its program with the total, for which all rows count.
        early = tl.load(stops + (w * batch + b) * tl.num_programs(0) + block).to(tl.int32)
        stop = tl.where(w == 0, rows, early)
    # Summed over the rows of a tile only at the very end, as that takes an exchange between threads.
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if mask is not None:
        mask += b * mask_b
    if marks is not None:
        marks += b * marks_b
    if band is not None:
        width = tl.load(widths + w * batch + b)
        position = tl.load(positions + b * total + t, mask=held, other=0)
        inside = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for at in range(start, stop, BLOCK_M):
        row = at + tl.arange(0, BLOCK_M)
        is_row = row < rows
        visible = is_row[:, None] & held[None, :]
        if mask is None:
            visible &= t[None, :] <= tl.load(columns + row, mask=is_row, other=0)[:, None]
        else:
            visible = seen(mask, row, t, mask_q, visible)
        base = finite(tl.load(lse + member * rows + row, mask=is_row, other=0.0))
        of_rows, of_columns = (of_query, row, query_stride[3], is_row), (of_keys, t, key_stride[2], held)
        products = products_of(of_rows, of_columns, D, BLOCK_M, BLOCK_N, BLOCK_D, NARROW)
        gate = gates_of(gates, gate_stride, b, h, g, row, is_row)
        x = marked(capped(products, inner, outer), gate, marks, t, total)
        received = tl.exp2(tl.where(visible, x - base[:, None], float("-inf")))
        if weights is None:
            sums = tl.maximum(sums, received)
        else:
            received *= tl.load(weights + b * rows + row, mask=is_row, other=0.0)[:, None]
            sums += received
        if band is not None:
            own = tl.load(row_positions + b * rows + row, mask=is_row, other=0)
            inside += tl.where(own[:, None] - position[None, :] < width, received, 0.0)
    if w == 0:
        of_mass = mass + member * total + t
        if weights is None:
            tl.store(of_mass, tl.max(sums, 0), mask=held)
        else:
            tl.store(of_mass, tl.sum(sums, 0), mask=held)
    if band is not None:
        place = (w * tl.num_programs(1) + member) * total
        tl.store(band + place + t, tl.sum(inside, 0), mask=held)
