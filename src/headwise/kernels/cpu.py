"""Compiled CPU kernels: tensors in main memory -> what `headwise.kernels.reference` defines, at the speed of memory.

The library is built with the package (`csrc/compile.py`) and called through ctypes; it works on torch's own threads.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from ctypes import c_float, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch

from headwise.prefill import query_blocks
from headwise.types import Bool, Decoded, Float, Int, LogitOptions, PageView, Tensor

_LIBRARY = Path(__file__).with_name(f"libheadwise_cpu.{'dylib' if sys.platform == 'darwin' else 'so'}")
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# Fewer bytes than this per thread are not worth waking it.
_BYTES_PER_SHARE = 64 * 1024


class _Pages(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("keys", "values", "columns", "scores", "table", "lengths")),
        *((name, c_int64) for name in ("page_size", "table_width", "longest", "key_dim", "value_dim", "type")),
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
        ("pages", _Pages),
        ("fresh", _Fresh),
        *((n, c_void_p) for n in ("query", "mask", "sinks", "output", "lse", "on_kept", "on_fresh")),
        *((name, c_int64) for name in ("batch", "heads", "group", "queries", "shares")),
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


class _ColumnMass(ctypes.Structure):
    _fields_ = [
        *((n, c_void_p) for n in ("products", "own", "mask", "sinks", "weights", "positions", "widths")),
        *((n, c_void_p) for n in ("mass", "band")),
        *((n, c_int64) for n in ("batch", "lanes", "rows", "seen", "total", "bands", "parts", "weight_stride")),
        ("mask_strides", c_int64 * 3),
        ("softcap", c_float),
        ("parallel_for", c_void_p),
    ]


def obstacle(device: torch.device) -> str | None:
    """Why these kernels cannot run on that device; None where they can."""
    if device.type != "cpu":
        return "they are for the CPU"
    found = _load()
    return found if isinstance(found, str) else None


def vectors(wanted: str = "") -> list[str]:
    """Names of the vector instructions this processor has, the best last.

    Args:
        wanted: those to use from now on; the best ones where empty.
    """
    names: bytes = _library()[0].headwise_vectors(wanted.encode())
    return names.decode().split()


def ragged_decode(
    query: Float[Tensor, "b h g q d"],
    pages: PageView,
    fresh_keys: Float[Tensor, "b h f d"],
    fresh_values: Float[Tensor, "b h f e"],
    mask: Bool[Tensor, "b q t"] | None,
    options: LogitOptions,
    *,
    with_mass: bool,
) -> Decoded:
    """As `reference.ragged_decode`."""
    library, parallel_for = _library()
    batch, heads, group, queries, key_dim = query.shape
    fresh, value_dim = fresh_values.shape[2:]
    dtype = pages.keys.dtype
    if query.dtype is not dtype or query.stride(-1) != 1:
        query = query.to(dtype).contiguous()
    kept_bytes = batch * heads * pages.longest * (key_dim + value_dim) * dtype.itemsize
    output = torch.empty(batch, heads, group, queries, value_dim)
    lse = torch.empty(batch, heads, group, queries)
    on_kept = torch.empty(batch, heads, queries, pages.longest) if with_mass else None
    on_fresh = torch.empty(batch, heads, queries, fresh) if with_mass else None
    sinks = None if options.sinks is None else options.sinks.float().contiguous()
    held, rows = _fresh(fresh_keys, fresh_values, dtype)
    arguments = _Decode(
        _pages(pages),
        rows,
        query.data_ptr(),
        _pointer(mask),
        _pointer(sinks),
        output.data_ptr(),
        lse.data_ptr(),
        _pointer(on_kept),
        _pointer(on_fresh),
        batch,
        heads,
        group,
        queries,
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
    keys: Float[Tensor, "b h f d"],
    values: Float[Tensor, "b h f e"],
    columns: Int[Tensor, " f"],
    real: Bool[Tensor, "b f"] | None,
    scores: Float[Tensor, "b h f"] | None,
    increments: Float[Tensor, "b h n"] | None,
) -> None:
    """As `reference.append`."""
    library, parallel_for = _library()
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
                _pointer(real),
                _pointer(scores),
                _pointer(increments),
                batch,
                heads,
                0 if increments is None else increments.shape[-1],
                parallel_for,
            )
        )
    )
    del held


def column_mass(
    query: Float[Tensor, "b h g q d"],
    keys: Float[Tensor, "b h t d"],
    columns: Int[Tensor, " q"],
    mask: Bool[Tensor, "b q t"] | None,
    options: LogitOptions,
    weights: Float[Tensor, "b q"],
    positions: Int[Tensor, "b t"],
    widths: Int[Tensor, "w b"],
) -> tuple[Float[Tensor, "b h g t"], Float[Tensor, "w b h g t"]]:
    """As `reference.column_mass`; the products are torch's, what follows is compiled."""
    heads, group = query.shape[1:3]
    total, bands = keys.shape[2], len(widths)
    mass = torch.empty(len(keys), heads, group, total)
    band = torch.empty(bands, len(keys), heads, group, total)
    # One sequence at a time: the more rows of a head a block holds, the faster are the products.
    for b in range(len(keys)):
        one = slice(b, b + 1)
        mass[b], band[:, b] = _sequence_mass(
            query[b],
            keys[b],
            columns.long().contiguous(),
            None if mask is None else mask[one],
            options,
            weights[one].float().contiguous(),
            positions[one].long().contiguous(),
            widths[:, one].long().contiguous(),
        )
    return mass, band


def _sequence_mass(
    query: Float[Tensor, "h g q d"],
    keys: Float[Tensor, "h t d"],
    columns: Int[Tensor, " q"],
    mask: Bool[Tensor, "1 q t"] | None,
    options: LogitOptions,
    weights: Float[Tensor, "1 q"],
    positions: Int[Tensor, "1 t"],
    widths: Int[Tensor, "w 1"],
) -> tuple[Float[Tensor, "h g t"], Float[Tensor, "w h g t"]]:
    library, parallel_for = _library()
    heads, group, rows, key_dim = query.shape
    total, bands, lanes = keys.shape[1], len(widths), heads * group
    # Rows of one head are added up apart where there are too few heads to keep every thread equally busy.
    parts = -(-8 * torch.get_num_threads() // lanes)
    mass = torch.zeros(parts, lanes, total)
    band = torch.zeros(bands, parts, lanes, total)
    transposed = keys.float().mT
    sinks = None if options.sinks is None else options.sinks.float().contiguous()
    for block in query_blocks(query[None], total):
        own = columns[block]
        seen = total if mask is not None else int(own[-1]) + 1
        asked = (query[:, :, block].float() * options.scaling).reshape(heads, -1, key_dim)
        visible = None if mask is None else mask[:, block]
        products = _scratch(heads * asked.shape[1] * seen).view(heads, asked.shape[1], seen)
        torch.bmm(asked, transposed[:, :, :seen], out=products)
        library.headwise_column_mass(
            ctypes.byref(
                _ColumnMass(
                    products.data_ptr(),
                    own.data_ptr(),
                    _pointer(visible),
                    _pointer(sinks),
                    weights[:, block].data_ptr(),
                    positions.data_ptr(),
                    widths.data_ptr(),
                    mass.data_ptr(),
                    band.data_ptr(),
                    1,
                    lanes,
                    len(own),
                    seen,
                    total,
                    bands,
                    parts,
                    rows,
                    (c_int64 * 3)() if visible is None else visible.stride(),
                    options.softcap or 0.0,
                    parallel_for,
                )
            )
        )
    shape = (heads, group, total)
    return mass.sum(dim=0).view(shape), band.sum(dim=1).view(bands, *shape)


def read(buffer: Tensor) -> int:
    """Read a contiguous tensor once with all threads, and return the sum of its bits: for measuring bandwidth."""
    library, parallel_for = _library()
    shares = torch.get_num_threads()
    sums = torch.zeros(shares, dtype=torch.int64)
    library.headwise_read(buffer.data_ptr(), buffer.nbytes // 8, shares, sums.data_ptr(), parallel_for)
    return int(sums.sum())


def _scratch(size: int) -> Tensor:
    """Memory of this thread that is used again and again: fresh pages from the system cost as much as the products."""
    held: Tensor | None = getattr(_kept, "scratch", None)
    if held is None or held.numel() < size:
        # It outlives an inference mode that may be on now.
        with torch.inference_mode(False):
            held = _kept.scratch = torch.empty(size)
    return held[:size]


_kept = threading.local()


@cache
def _load() -> tuple[ctypes.CDLL, int] | str:
    """The library and torch's parallel loop, or why they cannot be had."""
    if not _LIBRARY.is_file():
        return "they were not compiled when headwise was installed; install a C++ compiler and then headwise again"
    try:
        library = ctypes.CDLL(str(_LIBRARY))
        torch_library = ctypes.CDLL(_torch_library())
        parallel_for = ctypes.cast(torch_library.torch_parallel_for, c_void_p).value
    except (OSError, AttributeError) as error:
        return f"the compiled library does not load: {error}"
    assert parallel_for is not None
    for name in ("decode", "append", "column_mass"):
        function: Any = getattr(library, f"headwise_{name}")
        function.argtypes, function.restype = [c_void_p], None
    library.headwise_read.argtypes = [c_void_p, c_int64, c_int64, c_void_p, c_void_p]
    library.headwise_read.restype = None
    library.headwise_vectors.argtypes = [ctypes.c_char_p]
    library.headwise_vectors.restype = ctypes.c_char_p
    library.headwise_vectors(b"")
    return library, parallel_for


def _library() -> tuple[ctypes.CDLL, int]:
    found = _load()
    assert not isinstance(found, str), found
    return found


def _torch_library() -> str:
    folder = Path(torch.__file__).parent / "lib"
    return str(folder / f"libtorch_cpu.{'dylib' if sys.platform == 'darwin' else 'so'}")


def _pages(pages: PageView) -> _Pages:
    return _Pages(
        pages.keys.data_ptr(),
        pages.values.data_ptr(),
        pages.columns.data_ptr(),
        _pointer(pages.scores),
        pages.table.data_ptr(),
        pages.lengths.data_ptr(),
        pages.keys.shape[1],
        pages.table.shape[-1],
        pages.longest,
        pages.keys.shape[2],
        pages.values.shape[2],
        _TYPES[pages.keys.dtype],
    )


def _fresh(keys: Tensor, values: Tensor, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor], _Fresh]:
    """The structure, and the tensors that must live as long as it."""
    if keys.dtype is not dtype or keys.stride(-1) != 1:
        keys = keys.to(dtype).contiguous()
    if values.dtype is not dtype or values.stride(-1) != 1:
        values = values.to(dtype).contiguous()
    rows = _Fresh(keys.data_ptr(), values.data_ptr(), keys.shape[2], keys.stride(), values.stride())
    return (keys, values), rows


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


__all__ = ["append", "column_mass", "obstacle", "ragged_decode", "read", "vectors"]
