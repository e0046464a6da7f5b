"""Kernel calls: plain arguments -> the request objects that kernels take; one definition for all tests of kernels."""

from __future__ import annotations

import torch

from headwise.kernels.interface import AppendRequest, AttentionMap, DecodeRequest, MassRequest, PeaksRequest
from headwise.store.coded import CodedPages
from headwise.store.pages import PagePool
from headwise.store.row_parts import row_parts


def ragged_decode(kernels, query, pages, keys, values, mask, options, *, with_mass):
    return kernels.ragged_decode(DecodeRequest(query, pages, keys, values, mask, options, with_mass))


def append(kernels, pages, keys, values, columns, real, scores, increments):
    return kernels.append(AppendRequest([pages], keys, values, columns, real, scores, increments))


def column_mass(kernels, query, keys, columns, mask, options, weights, positions, widths):
    return kernels.column_mass(
        MassRequest(AttentionMap(query, keys, mask, options, columns), weights, positions, widths)
    )


def column_max(kernels, query, keys, columns, mask, options):
    return kernels.column_max(AttentionMap(query, keys, mask, options, columns))


def attention_and_peaks(kernels, query, keys, values, mask, options, counted):
    return kernels.attention_and_peaks(PeaksRequest(AttentionMap(query, keys, mask, options), values, counted))


def pool_like(rows, *, page_size, scored, biased=False):
    """An empty pool for rows of that kind."""
    parts = row_parts(rows.keys.shape[-1], rows.values.shape[-1], rows.keys.dtype, scored=scored, biased=biased)
    return PagePool(rows.keys.shape[:2], parts, page_size=page_size, device=rows.keys.device)


def new_pool(*, batch, heads, key_dim, value_dim, dtype, page_size, scored):
    parts = row_parts(key_dim, value_dim, dtype, scored=scored)
    return PagePool((batch, heads), parts, page_size=page_size, device=torch.device("cpu"))


def append_rows(store, keys, values, columns, real, scores, increments, kernels):
    """To one pool, as `RowStore.append` does it."""
    count = keys.shape[2]
    store.pages.reserve(count + store.page_size - 1, least=count)
    append(kernels, store.view(), keys, values, columns, real, scores, increments)
    store.pages.count(count)


def add_increments(kernels, views, increments):
    """Add to the scores of rows in views of any kind, with no row that is new."""
    exact = views[0]
    keys, values = (pool.new_empty(*increments.shape[:2], 0, pool.shape[-1]) for pool in (exact.keys, exact.values))
    scores = increments.new_empty(*increments.shape[:2], 0)
    kernels.append(AppendRequest(views, keys, values, torch.zeros(0).long(), None, scores, increments))


def coded_like(rows, format, *, page_size, scored, biased=False):
    """Empty pages of codes for rows of that kind."""
    dims = rows.keys.shape[-1], rows.values.shape[-1]
    sizes = {"page_size": page_size, "scored": scored, "biased": biased, "device": rows.keys.device}
    return CodedPages(rows.keys.shape[:2], *dims, rows.keys.dtype, format, **sizes)
