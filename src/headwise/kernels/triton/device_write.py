"""Triton device code for new rows: rows and increments -> pages, and the scores of rows that are there.

Written like `device_pages` beside it, which explains the conventions.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from headwise.kernels.triton.device_tiles import addresses, put_pooled, tile


@triton.jit(
    do_not_specialize=[
        *("columns", "real", "scores", "increments", "real_b", "real_f", "score_b", "score_h", "more_b", "more_h"),
        *("fresh", "fresh_blocks", "more", "pages"),
    ]
)
@no_type_check
def write(
    key_pool,
    value_pool,
    column_pool,
    score_pool,
    bias_pool,
    table,
    lengths,
    keys,
    values,
    columns,
    real,
    scores,
    increments,
    length_stride,
    key_stride,
    value_stride,
    real_b,
    real_f,
    score_b,
    score_h,
    more_b,
    more_h,
    heads,
    fresh,
    fresh_blocks,
    more,
    pages,
    D: tl.constexpr,
    E: tl.constexpr,
    PAGE: tl.constexpr,
    KEY_STRIDES: tl.constexpr,
    VALUE_STRIDES: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Write one block of new rows of a head, or add one block of increments to the scores of those it has.

    Args:
        more: increments per head.
        COUNT: whether to add the new rows to the head's length; only where a head has no other program, which could
            read the length too late.
    """
    head = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    b = head // heads
    h = head % heads
    own_length = lengths + b * length_stride[0] + h * length_stride[1]
    length = tl.load(own_length).to(tl.int32)
    if block < fresh_blocks:
        f = block * BLOCK_F + tl.arange(0, BLOCK_F)
        wanted = f < fresh
        n = length + f
        if real is not None:
            of_real = real + b * real_b
            before = 0
            for at in range(0, block * BLOCK_F, BLOCK_N):
                earlier = at + tl.arange(0, BLOCK_N)
                is_real = tl.load(of_real + earlier * real_f, mask=earlier < block * BLOCK_F, other=0) != 0
                before += tl.sum(is_real.to(tl.int32), 0)
            wanted = wanted & (tl.load(of_real + f * real_f, mask=wanted, other=0) != 0)
            n = length + before + tl.cumsum(wanted.to(tl.int32), 0) - 1
        address = addresses(table + head * pages, n, wanted, PAGE)
        feature = tl.arange(0, BLOCK_D)
        channel = tl.arange(0, BLOCK_E)
        k = tile(keys + b * key_stride[0] + h * key_stride[1], f, key_stride[2], wanted, feature, D)
        v = tile(values + b * value_stride[0] + h * value_stride[1], f, value_stride[2], wanted, channel, E)
        put_pooled(key_pool, table + head * pages, n, wanted, feature, D, PAGE, KEY_STRIDES, k)
        put_pooled(value_pool, table + head * pages, n, wanted, channel, E, PAGE, VALUE_STRIDES, v)
        if column_pool is not None:
            tl.store(column_pool + address, tl.load(columns + f, mask=wanted), mask=wanted)
        if score_pool is not None:
            of_scores = scores + b * score_b + h * score_h + f
            tl.store(score_pool + address, tl.load(of_scores, mask=wanted), mask=wanted)
        if bias_pool is not None:
            tl.store(bias_pool + address, 0.0, mask=wanted)
        if COUNT:
            # Every thread has loaded the old length before one of them stores the new one.
            tl.debug_barrier()
            tl.store(own_length, length + tl.sum(wanted.to(tl.int32), 0))
    elif increments is not None:
        old = (block - fresh_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
        held = (old < more) & (old < length)
        score = score_pool + addresses(table + head * pages, old, held, PAGE)
        increment = tl.load(increments + b * more_b + h * more_h + old, mask=held, other=0.0)
        tl.store(score, tl.load(score, mask=held, other=0.0) + increment, mask=held)
