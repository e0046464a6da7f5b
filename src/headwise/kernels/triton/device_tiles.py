"""Triton tiles: the steps that the device code for pages and for attention maps is put together from.

`headwise.kernels.triton.device_pages` explains the conventions. None may be passed on, but Triton 3.6 cannot return it.
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
def put(start, index, stride, held, channel, WIDTH: tl.constexpr, rows):
    """The way back: rows into a matrix, where they are held."""
    at = start + index.to(tl.int64)[:, None] * stride + channel[None, :]
    tl.store(at, rows, mask=held[:, None] & (channel < WIDTH)[None, :])


@triton.jit
@no_type_check
def pooled(pool, table, n, held, channel, WIDTH: tl.constexpr, PAGE: tl.constexpr, STRIDES: tl.constexpr):
    """Rows of a head, from wherever its part of the table says; 0 where nothing is held.

    Args:
        STRIDES: of the pool, between pages, rows and channels.
    """
    at = pool + place(table, n, held, PAGE, STRIDES)[:, None] + channel[None, :] * STRIDES[2]
    return tl.load(at, mask=held[:, None] & (channel < WIDTH)[None, :], other=0.0)


@triton.jit
@no_type_check
def put_pooled(pool, table, n, held, channel, WIDTH: tl.constexpr, PAGE: tl.constexpr, STRIDES: tl.constexpr, rows):
    """The way back: rows of a head to where its part of the table says."""
    at = pool + place(table, n, held, PAGE, STRIDES)[:, None] + channel[None, :] * STRIDES[2]
    tl.store(at, rows, mask=held[:, None] & (channel < WIDTH)[None, :])


@triton.jit
@no_type_check
def place(table, n, held, PAGE: tl.constexpr, STRIDES: tl.constexpr):
    """Where in a pool the first channels of a head's rows lie."""
    page = tl.load(table + n // PAGE, mask=held, other=0)
    return page.to(tl.int64) * STRIDES[0] + n % PAGE * STRIDES[1]


@triton.jit
@no_type_check
def addresses(table, n, held, PAGE: tl.constexpr):
    """Where in the pools the rows of a head lie, by its part of the table; compiles to nothing where it is not used."""
    page = tl.load(table + n // PAGE, mask=held, other=0)
    return page.to(tl.int64) * PAGE + n % PAGE


@triton.jit
@no_type_check
def looked_up(column_pool, address, held, asks, query_row, mask, mask_q):
    """What each query sees of rows in pages, and their columns, which compile to nothing where they are not used."""
    visible = asks[:, None] & held[None, :]
    column = address
    if column_pool is not None:
        column = tl.load(column_pool + address, mask=held, other=0)
    if mask is not None:
        visible = seen(mask, query_row, column, mask_q, visible)
    return visible, column


@triton.jit
@no_type_check
def seen(mask, query_row, column, mask_q, visible):
    """What of `visible` the mask lets through; it reads nothing else of the mask."""
    at = mask + query_row.to(tl.int64)[:, None] * mask_q + column.to(tl.int64)[None, :]
    return visible & (tl.load(at, mask=visible, other=0) != 0)


@triton.jit
@no_type_check
def seen_fresh(mask, mask_q, unseen, f, fresh, query_row, queries, visible):
    """What of `visible` each query sees of the fresh rows: what the mask says, or those up to its own."""
    if mask is None:
        visible = visible & (f[None, :] <= fresh - queries + query_row[:, None])
    else:
        visible = seen(mask, query_row, unseen + f, mask_q, visible)
    return visible


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
def biased(logits, bias_pool, address, held):
    """Logits in base 2, with the biases of their rows where rows have any."""
    if bias_pool is not None:
        bias = tl.load(bias_pool + address, mask=held, other=0.0).to(tl.float32)
        logits += (bias * 1.4426950408889634)[None, :]
    return logits


@triton.jit
@no_type_check
def gates_of(gates, stride, b, h, g, i, asks):
    """Gates of query rows, times log2(e) as logits are in base 2; 0 where nobody asks, and anything without gates."""
    found = i
    if gates is not None:
        at = gates + b * stride[0] + h * stride[1] + g * stride[2] + i.to(tl.int64) * stride[3]
        found = tl.load(at, mask=asks, other=0.0) * 1.4426950408889634
    return found


@triton.jit
@no_type_check
def marked(logits, gate, marks, column, count):
    """Logits in base 2, with the gate of each query times the mark of each column, of which the first so many have one.

    Where there is no row its column must be 0 or have no mark; what is added there is overwritten.
    """
    if marks is not None:
        mark = tl.load(marks + column, mask=column < count, other=0.0)
        logits += gate[:, None] * mark[None, :]
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
def soften(logits, top, total):
    """One step of the online softmax (FlashAttention-2, Dao 2023, section 3.1).

    Returns:
        maximum and denominator with these rows, the weights of these, and what the earlier ones' decay by.
    """
    raised = tl.maximum(top, tl.max(logits, 1))
    base = finite(raised)
    weights = tl.exp2(logits - base[:, None])
    decay = tl.exp2(top - base)
    return raised, total * decay + tl.sum(weights, 1), weights, decay


@triton.jit
@no_type_check
def absorb(output, decay, weights, values, NARROW: tl.constexpr):
    """The output with these rows' values in it."""
    output = output * decay[:, None]
    if NARROW:
        output = tl.dot(weights.to(values.dtype), values, output)
    else:
        output += tl.sum(weights[:, :, None] * values.to(tl.float32)[None, :, :], 1)
    return output


@triton.jit
@no_type_check
def record(span, split, begin, length):
    """Note where the logits of a head's rows in a view begin and end; the first split does."""
    if split == 0:
        tl.store(span, begin)
        tl.store(span + 1, begin + length)


@triton.jit
@no_type_check
def lane_of(member, heads, GROUP: tl.constexpr):
    """Sequence, KV head and place in its group of a query head, counted over all sequences."""
    return member // GROUP // heads, member // GROUP % heads, member % GROUP


@triton.jit
@no_type_check
def asked(query, stride, member, queries, asks, feature, WIDTH: tl.constexpr):
    """Query rows of a head's members; 0 where nobody asks."""
    g = (member // queries).to(tl.int64)
    i = (member % queries).to(tl.int64)
    at = query + (g * stride[2] + i * stride[3])[:, None] + feature[None, :]
    return tl.load(at, mask=asks[:, None] & (feature < WIDTH)[None, :], other=0.0)


@triton.jit
@no_type_check
def note(logits, at, x, asks, held):
    """Keep logits for those who are going to weigh them; nobody is where there is no memory for it."""
    if logits is not None:
        tl.store(logits + at, x, mask=asks[:, None] & held[None, :])
