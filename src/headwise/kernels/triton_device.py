"""Triton device code for pages: queries, pages and fresh rows -> attention, split by split; new rows -> pages.

Imported only where Triton is there; `headwise.kernels.triton` launches it. Axis letters are those of
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


@triton.jit
@no_type_check
def tile(start, index, stride, held, channel, WIDTH: tl.constexpr):
    """Rows of a matrix, gathered by index; 0 where nothing is held."""
    at = start + index.to(tl.int64)[:, None] * stride + channel[None, :]
    return tl.load(at, mask=held[:, None] & (channel < WIDTH)[None, :], other=0.0)


@triton.jit
@no_type_check
def seen(mask, query_row, column, mask_q, visible):
    """What of `visible` the mask lets through; it reads nothing else of the mask."""
    at = mask + query_row.to(tl.int64)[:, None] * mask_q + column.to(tl.int64)[None, :]
    return visible & (tl.load(at, mask=visible, other=0) != 0)


@triton.jit
@no_type_check
def capped(products, inner, outer):
    """Logits in base 2: inner * q.k, or outer * tanh(inner * q.k) under a soft cap."""
    logits = products * inner
    if outer is not None:
        # Through the exponential of a negative number, which cannot overflow.
        shrunk = tl.exp2(tl.abs(logits) * -2.8853900817779268)
        size = outer * (1 - shrunk) / (1 + shrunk)
        logits = tl.where(logits < 0, -size, size)
    return logits


@triton.jit
@no_type_check
def products_of(query, keys, NARROW: tl.constexpr):
    """Products of a few queries with keys, in fp32."""
    if NARROW:
        # Products of 16-bit numbers are exact in fp32, in which the tensor cores sum them.
        products = tl.dot(query, tl.trans(keys))
    else:
        # A matrix product in full fp32 wants a whole row and column in registers, and spills; this does not.
        products = tl.sum(query.to(tl.float32)[:, None, :] * keys.to(tl.float32)[None, :, :], 2)
    return products


@triton.jit
@no_type_check
def finite(top):
    """The same with 0 for minus infinity, from which nothing can be subtracted."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
@no_type_check
def absorb(logits, values, top, total, output, NARROW: tl.constexpr):
    """One step of the online softmax (FlashAttention-2, Dao 2023, section 3.1): maximum, denominator, output."""
    raised = tl.maximum(top, tl.max(logits, 1))
    base = finite(raised)
    weights = tl.exp2(logits - base[:, None])
    decay = tl.exp2(top - base)
    total = total * decay + tl.sum(weights, 1)
    output = output * decay[:, None]
    if NARROW:
        output = tl.dot(weights.to(values.dtype), values, output)
    else:
        output += tl.sum(weights[:, :, None] * values.to(tl.float32)[None, :, :], 1)
    return raised, total, output


@triton.jit(
    do_not_specialize=[
        "mask",
        "mask_b",
        "mask_q",
        "unseen",
        "queries",
        "fresh",
        "splits",
        "split_rows",
        "longest",
        "pages",
    ]
)
@no_type_check
def attend(
    query,
    key_pool,
    value_pool,
    column_pool,
    table,
    lengths,
    keys,
    values,
    mask,
    partial,
    partial_lse,
    logits,
    query_stride,
    length_stride,
    key_stride,
    value_stride,
    mask_b,
    mask_q,
    unseen,
    heads,
    queries,
    fresh,
    splits,
    split_rows,
    longest,
    pages,
    inner,
    outer,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    NARROW: tl.constexpr,
):
    """Attention of a block of a head's members over one split of its kept rows; the last split is the fresh rows.

    Writes the output and the denominator that the split has by itself, and the logits where `weigh` will need them.

    Args:
        unseen: the mask's column of the first fresh row.
        pages: entries of the table per head.
    """
    head = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    b = head // heads
    h = head % heads
    members = GROUP * queries
    member = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    asks = member < members
    place = (head * (splits + 1) + split) * members + member
    length = tl.load(lengths + b * length_stride[0] + h * length_stride[1]).to(tl.int32)
    start = split * split_rows
    stop = tl.minimum(start + split_rows, length)
    if (split < splits) & (start >= stop):
        # `combine` reads no output of a split that saw nothing.
        tl.store(partial_lse + place, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=asks)
        return

    g = (member // queries).to(tl.int64)
    i = (member % queries).to(tl.int64)
    feature = tl.arange(0, BLOCK_D)
    channel = tl.arange(0, BLOCK_E)
    q = tl.load(
        (query + b * query_stride[0] + h * query_stride[1])
        + (g * query_stride[2] + i * query_stride[3])[:, None]
        + feature[None, :],
        mask=asks[:, None] & (feature < D)[None, :],
        other=0.0,
    )
    if mask is not None:
        mask += b * mask_b
    of_logits = (head * members + member)[:, None] * (longest + fresh)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    output = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)

    # The last split begins behind every kept row, so this loop does nothing there; nor does the next one elsewhere.
    for at in range(start, stop, BLOCK_N):
        n = at + tl.arange(0, BLOCK_N)
        held = n < stop
        page = tl.load(table + head * pages + n // PAGE, mask=held, other=0)
        address = page.to(tl.int64) * PAGE + n % PAGE
        k = tile(key_pool, address, D, held, feature, D)
        v = tile(value_pool, address, E, held, channel, E)
        visible = asks[:, None] & held[None, :]
        if mask is not None:
            column = tl.load(column_pool + address, mask=held, other=0)
            visible = seen(mask, i, column, mask_q, visible)
        x = tl.where(visible, capped(products_of(q, k, NARROW), inner, outer), float("-inf"))
        if logits is not None:
            tl.store(logits + of_logits + n[None, :], x, mask=asks[:, None] & held[None, :])
        top, total, output = absorb(x, v, top, total, output, NARROW)

    for at in range(0, tl.where(split == splits, fresh, 0), BLOCK_N):
        f = at + tl.arange(0, BLOCK_N)
        held = f < fresh
        k = tile(keys + b * key_stride[0] + h * key_stride[1], f, key_stride[2], held, feature, D)
        v = tile(values + b * value_stride[0] + h * value_stride[1], f, value_stride[2], held, channel, E)
        visible = asks[:, None] & held[None, :]
        if mask is not None:
            visible = seen(mask, i, unseen + f, mask_q, visible)
        else:
            visible = visible & (f[None, :] <= fresh - queries + i[:, None])
        x = tl.where(visible, capped(products_of(q, k, NARROW), inner, outer), float("-inf"))
        if logits is not None:
            tl.store(logits + of_logits + longest + f[None, :], x, mask=asks[:, None] & held[None, :])
        top, total, output = absorb(x, v, top, total, output, NARROW)

    some = tl.where(total > 0, total, 1.0)
    tl.store(partial_lse + place, top + tl.log2(some), mask=asks)
    of_output = partial + place[:, None] * E + channel[None, :]
    tl.store(of_output, output / some[:, None], mask=asks[:, None] & (channel < E)[None, :])


@triton.jit(do_not_specialize=["queries", "parts"])
@no_type_check
def combine(
    partial,
    partial_lse,
    sinks,
    output,
    lse,
    heads,
    queries,
    parts,
    GROUP: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Merge the splits of one member, and its sink logit, into its output and its natural log-sum-exp."""
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
        merged = merged * decay + tl.sum(weights[:, None] * values, 0)
        top = raised
    some = tl.where(total > 0, total, 1.0)
    tl.store(output + own * E + channel, merged / some, mask=channel < E)
    tl.store(lse + own + tl.arange(0, 1), (top + tl.log2(some)) * 0.6931471805599453)


@triton.jit(do_not_specialize=["queries", "longest", "fresh"])
@no_type_check
def weigh(
    logits,
    lse,
    lengths,
    mass,
    length_stride,
    heads,
    queries,
    longest,
    fresh,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Probabilities of one query over a block of rows, the kept and then the fresh ones, summed over the group."""
    pair = tl.program_id(0).to(tl.int64)
    head = pair // queries
    width = longest + fresh
    length = tl.load(lengths + head // heads * length_stride[0] + head % heads * length_stride[1])
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Nobody has written a logit between a head's length and the fresh rows.
    there = (n < length) | ((n >= longest) & (n < width))
    received = tl.zeros([BLOCK_N], tl.float32)
    for g in tl.static_range(GROUP):
        own = (head * GROUP + g) * queries + pair % queries
        base = finite(tl.load(lse + own)) * 1.4426950408889634
        received += tl.exp2(tl.load(logits + own * width + n, mask=there, other=float("-inf")) - base)
    tl.store(mass + pair * width + n, received, mask=n < width)


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
        page = tl.load(table + head * pages + n // PAGE, mask=wanted, other=0)
        address = page.to(tl.int64) * PAGE + n % PAGE
        feature = tl.arange(0, BLOCK_D)
        channel = tl.arange(0, BLOCK_E)
        k = tile(keys + b * key_stride[0] + h * key_stride[1], f, key_stride[2], wanted, feature, D)
        v = tile(values + b * value_stride[0] + h * value_stride[1], f, value_stride[2], wanted, channel, E)
        to_key = key_pool + address[:, None] * D + feature[None, :]
        to_value = value_pool + address[:, None] * E + channel[None, :]
        tl.store(to_key, k, mask=wanted[:, None] & (feature < D)[None, :])
        tl.store(to_value, v, mask=wanted[:, None] & (channel < E)[None, :])
        tl.store(column_pool + address, tl.load(columns + f, mask=wanted), mask=wanted)
        if score_pool is not None:
            of_scores = scores + b * score_b + h * score_h + f
            tl.store(score_pool + address, tl.load(of_scores, mask=wanted), mask=wanted)
        if COUNT:
            # Every thread has loaded the old length before one of them stores the new one.
            tl.debug_barrier()
            tl.store(own_length, length + tl.sum(wanted.to(tl.int32), 0))
    elif increments is not None:
        old = (block - fresh_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
        held = (old < more) & (old < length)
        page_of_old = tl.load(table + head * pages + old // PAGE, mask=held, other=0)
        score = score_pool + page_of_old.to(tl.int64) * PAGE + old % PAGE
        increment = tl.load(increments + b * more_b + h * more_h + old, mask=held, other=0.0)
        tl.store(score, tl.load(score, mask=held, other=0.0) + increment, mask=held)
