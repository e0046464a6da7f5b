"""Calls: requests over pages in main memory -> the compiled kernels that read and write them."""

from __future__ import annotations

import ctypes

import torch

from headwise.errors import InputError
from headwise.kernels.check import check_append, check_decode
from headwise.kernels.cpu.library import FLOAT, library_and_threads, pointer
from headwise.kernels.cpu.structs import (
    AppendStruct,
    DecodeStruct,
    PagesStruct,
    fresh_struct,
    marks_struct,
    pages_struct,
)
from headwise.kernels.interface import AppendRequest, Decoded, DecodeRequest, PageView
from headwise.types import Tensor

# Fewer bytes than this per thread are not worth waking it.
_BYTES_PER_SHARE = 64 * 1024


def ragged_decode(request: DecodeRequest) -> Decoded:
    """As `reference.ragged_decode`."""
    check_decode(request)
    library, parallel_for = library_and_threads()
    query, pages, mask, options = request.query, request.pages, request.mask, request.options
    batch, heads, group, queries, key_dim = query.shape
    fresh, value_dim = request.fresh_values.shape[2:]
    dtype = pages[0].keys.dtype
    if query.dtype is not dtype or query.stride(-1) != 1:
        query = query.to(dtype).contiguous()
    kept = sum(view.longest for view in pages)
    kept_bytes = batch * heads * sum(view.longest * view.kv_bytes for view in pages)
    output = torch.empty(batch, heads, group, queries, value_dim, **FLOAT)
    lse = torch.empty(batch, heads, group, queries, **FLOAT)
    on_kept = torch.empty(batch, heads, queries, kept, **FLOAT) if request.with_mass else None
    on_fresh = torch.empty(batch, heads, queries, fresh, **FLOAT) if request.with_mass else None
    sinks = None if options.sinks is None else options.sinks.float().contiguous()
    held, rows = fresh_struct(request.fresh_keys, request.fresh_values, dtype)
    kept_marks, marks = marks_struct(request.marks)
    arguments = DecodeStruct(
        (PagesStruct * len(pages))(*map(pages_struct, pages)),
        len(pages),
        rows,
        query.data_ptr(),
        pointer(mask),
        pointer(sinks),
        output.data_ptr(),
        lse.data_ptr(),
        pointer(on_kept),
        pointer(on_fresh),
        batch,
        heads,
        group,
        queries,
        key_dim,
        value_dim,
        max(1, min(torch.get_num_threads(), kept_bytes // _BYTES_PER_SHARE)),
        query.stride(),
        0 if mask is None else mask.shape[-1],
        (0, 0, 0) if mask is None else mask.stride(),
        marks,
        options.scaling,
        options.softcap or 0.0,
        parallel_for,
    )
    _check(library.headwise_decode(ctypes.byref(arguments)))
    del held, kept_marks
    return Decoded(output if dtype is torch.float32 else output.to(dtype), lse, on_kept, on_fresh)


def append(request: AppendRequest) -> None:
    """As `reference.append`."""
    check_append(request)
    exact, *coded = zip(request.pages, request.increments_by_view(), strict=True)
    for view, increments in coded:
        # Rows that are codes take in none: there are only the increments.
        if increments is not None:
            heads = increments.shape[:2]
            keys, values = (pool.new_empty(*heads, 0, pool.shape[-1]) for pool in (view.keys, view.values))
            _write(view, keys, values, request.columns[:0], None, None, increments)
    view, increments = exact
    _write(view, request.keys, request.values, request.columns, request.real, request.scores, increments)


def _write(
    pages: PageView,
    keys: Tensor,
    values: Tensor,
    columns: Tensor,
    real: Tensor | None,
    scores: Tensor | None,
    increments: Tensor | None,
) -> None:
    library, parallel_for = library_and_threads()
    held, rows = fresh_struct(keys, values, pages.keys.dtype)
    columns = columns.to(torch.int32).contiguous()
    real = None if real is None else real.contiguous()
    scores = None if scores is None else scores.contiguous()
    if increments is not None and (increments.stride(-1) != 1 or increments.stride(0) != _rows_apart(increments)):
        increments = increments.contiguous()
    batch, heads = pages.lengths.shape
    arguments = AppendStruct(
        pages_struct(pages),
        rows,
        columns.data_ptr(),
        pointer(real),
        pointer(scores),
        pointer(increments),
        batch,
        heads,
        0 if increments is None else increments.shape[-1],
        0 if increments is None else increments.stride(1),
        parallel_for,
    )
    _check(library.headwise_append(ctypes.byref(arguments)))
    del held


# What the library answers where it did not do what it was asked: `Status` in `csrc/headwise.h`.
_REFUSALS = {
    1: "a length or an entry of a page table lies outside of the pages",
    2: "the column of a kept row lies outside of the mask",
}


def _check(status: int) -> None:
    if status:
        raise InputError(f"{_REFUSALS[status]}: what the cache holds was changed from outside; make a new cache")


def _rows_apart(increments: Tensor) -> int:
    """Numbers between the increments of two sequences, where those of their heads lie at equal steps."""
    return increments.stride(1) * increments.shape[1]
