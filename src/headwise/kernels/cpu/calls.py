"""Compiled CPU kernels: tensors in main memory -> what `headwise.kernels.reference` defines, at the speed of memory.

Those that read the attention map of a prompt stand in `headwise.kernels.cpu.map`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p

import torch

from headwise.kernels.cpu import library
from headwise.kernels.cpu.library import library_and_threads, pointer
from headwise.kernels.cpu.map import attention_and_peaks, column_mass
from headwise.types import Bool, Decoded, Float, Int, LogitOptions, Packing, PageView, Tensor, UInt8

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}

# Fewer bytes than this per thread are not worth waking it.
_BYTES_PER_SHARE = 64 * 1024


class _Packing(ctypes.Structure):
    _fields_ = [("steps", c_void_p), ("rotation", c_void_p), ("bits", c_int64), ("groups", c_int64)]


class _Pages(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("keys", "values", "columns", "scores", "table", "lengths")),
        *((name, c_int64) for name in ("page_size", "table_width", "longest", "key_width", "value_width", "type")),
        ("key_packing", _Packing),
        ("value_packing", _Packing),
    ]


class _Fresh(ctypes.Structure):
    _fields_ = [
        ("keys", c_void_p),
        ("values", c_void_p),
        ("count", c_int64),
        ("key_strides", c_int64 * 4),
        ("value_strides", c_int64 * 4),
    ]


class _Decode(ctypes.Structure):
    _fields_ = [
        ("pages", ctypes.POINTER(_Pages)),
        ("views", c_int64),
        ("fresh", _Fresh),
        *((n, c_void_p) for n in ("query", "mask", "sinks", "output", "lse", "on_kept", "on_fresh")),
        *((name, c_int64) for name in ("batch", "heads", "group", "queries", "key_dim", "value_dim", "shares")),
        ("query_strides", c_int64 * 5),
        ("mask_columns", c_int64),
        ("mask_strides", c_int64 * 3),
        ("scaling", c_float),
        ("softcap", c_float),
        ("parallel_for", c_void_p),
    ]


class _Append(ctypes.Structure):
    _fields_ = [
        ("pages", _Pages),
        ("rows", _Fresh),
        *((name, c_void_p) for name in ("columns", "real", "scores", "increments")),
        *((name, c_int64) for name in ("batch", "heads", "increment_rows")),
        ("parallel_for", c_void_p),
    ]


def obstacle(device: torch.device) -> str | None:
    """Why these kernels cannot run on that device; None where they can."""
    if device.type != "cpu":
        return "they are for the CPU"
    found = library.load()
    return found if isinstance(found, str) else None


def vectors(wanted: str = "") -> list[str]:
    """Names of the vector instructions this processor has, the best last.

    Args:
        wanted: those to use from now on; the best ones where empty.
    """
    names: bytes = library_and_threads()[0].headwise_vectors(wanted.encode())
    return names.decode().split()


def ragged_decode(
    query: Float[Tensor, "b h g q d"],
    pages: Sequence[PageView],
    fresh_keys: Float[Tensor, "b h f d"],
    fresh_values: Float[Tensor, "b h f e"],
    mask: Bool[Tensor, "b q t"] | None,
    options: LogitOptions,
    *,
    with_mass: bool,
) -> Decoded:
    """As `reference.ragged_decode`."""
    library, parallel_for = library_and_threads()
    batch, heads, group, queries, key_dim = query.shape
    fresh, value_dim = fresh_values.shape[2:]
    dtype = pages[0].keys.dtype
    if query.dtype is not dtype or query.stride(-1) != 1:
        query = query.to(dtype).contiguous()
    kept = sum(view.longest for view in pages)
    kept_bytes = batch * heads * sum(view.longest * _row_bytes(view) for view in pages)
    output = torch.empty(batch, heads, group, queries, value_dim)
    lse = torch.empty(batch, heads, group, queries)
    on_kept = torch.empty(batch, heads, queries, kept) if with_mass else None
    on_fresh = torch.empty(batch, heads, queries, fresh) if with_mass else None
    sinks = None if options.sinks is None else options.sinks.float().contiguous()
    held, rows = _fresh(fresh_keys, fresh_values, dtype)
    arguments = _Decode(
        (_Pages * len(pages))(*map(_pages, pages)),
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
        options.scaling,
        options.softcap or 0.0,
        parallel_for,
    )
    library.headwise_decode(ctypes.byref(arguments))
    del held
    return Decoded(output if dtype is torch.float32 else output.to(dtype), lse, on_kept, on_fresh)


def append(
    pages: PageView,
    keys: Float[Tensor, "b h f d"] | UInt8[Tensor, "b h f kc"],
    values: Float[Tensor, "b h f e"] | UInt8[Tensor, "b h f vc"],
    columns: Int[Tensor, " f"],
    real: Bool[Tensor, "b f"] | None,
    scores: Float[Tensor, "b h f"] | None,
    increments: Float[Tensor, "b h n"] | None,
) -> None:
    """As `reference.append`."""
    library, parallel_for = library_and_threads()
    held, rows = _fresh(keys, values, pages.keys.dtype)
    columns = columns.to(torch.int32).contiguous()
    real = None if real is None else real.contiguous()
    scores = None if scores is None else scores.contiguous()
    increments = None if increments is None else increments.contiguous()
    batch, heads = pages.lengths.shape
    library.headwise_append(
        ctypes.byref(
            _Append(
                _pages(pages),
                rows,
                columns.data_ptr(),
                pointer(real),
                pointer(scores),
                pointer(increments),
                batch,
                heads,
                0 if increments is None else increments.shape[-1],
                parallel_for,
            )
        )
    )
    del held


def read(buffer: Tensor) -> int:
    """Read a contiguous tensor once with all threads, and return the sum of its bits: for measuring bandwidth."""
    library, parallel_for = library_and_threads()
    shares = torch.get_num_threads()
    sums = torch.zeros(shares, dtype=torch.int64)
    library.headwise_read(buffer.data_ptr(), buffer.nbytes // 8, shares, sums.data_ptr(), parallel_for)
    return int(sums.sum())


def _pages(view: PageView) -> _Pages:
    return _Pages(
        view.keys.data_ptr(),
        view.values.data_ptr(),
        view.columns.data_ptr(),
        pointer(view.scores),
        view.table.data_ptr(),
        view.lengths.data_ptr(),
        view.columns.shape[1],
        view.table.shape[-1],
        view.longest,
        view.keys.shape[2],
        view.values.shape[2],
        _TYPES[view.keys.dtype],
        *_packings(view.packing),
    )


def _packings(packing: Packing | None) -> tuple[_Packing, _Packing]:
    if packing is None:
        return _Packing(), _Packing()
    return (
        _packing(packing.key_bits, packing.key_steps, packing.key_rotation),
        _packing(packing.value_bits, packing.value_steps, packing.value_rotation),
    )


def _packing(bits: int, steps: Tensor, rotation: Tensor) -> _Packing:
    return _Packing(steps.data_ptr(), rotation.data_ptr(), bits, steps.shape[-1] // 2)


def _row_bytes(view: PageView) -> int:
    return (view.keys.shape[2] + view.values.shape[2]) * view.keys.element_size()


def _fresh(keys: Tensor, values: Tensor, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor], _Fresh]:
    """The structure, and the tensors that must live as long as it."""
    if keys.dtype is not dtype or keys.stride(-1) != 1:
        keys = keys.to(dtype).contiguous()
    if values.dtype is not dtype or values.stride(-1) != 1:
        values = values.to(dtype).contiguous()
    rows = _Fresh(keys.data_ptr(), values.data_ptr(), keys.shape[2], keys.stride(), values.stride())
    return (keys, values), rows


__all__ = ["append", "attention_and_peaks", "column_mass", "obstacle", "ragged_decode", "read", "vectors"]
