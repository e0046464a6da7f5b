"""Compiled CPU kernels that read the attention map of a prompt: queries and keys -> what its columns get.

The products are torch's, block by block; what follows is compiled.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from ctypes import c_float, c_int64, c_void_p

import torch

from headwise.kernels.attention import query_blocks
from headwise.kernels.check import check_mass, check_peaks
from headwise.kernels.cpu.library import FLOAT, library_and_threads, pointer
from headwise.kernels.interface import AttentionMap, MassRequest, PeaksRequest
from headwise.types import Float, Tensor


class _Block(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("products", "own", "mask", "sinks", "marks", "gates")),
        *((name, c_int64) for name in ("lanes", "rows", "seen", "mask_stride")),
        ("softcap", c_float),
    ]


class _ColumnMass(ctypes.Structure):
    _fields_ = [
        ("block", _Block),
        *((name, c_void_p) for name in ("weights", "positions", "widths", "mass", "band")),
        *((name, c_int64) for name in ("total", "bands", "parts")),
        ("parallel_for", c_void_p),
    ]


class _AttentionPeaks(ctypes.Structure):
    _fields_ = [
        ("block", _Block),
        *((name, c_void_p) for name in ("counted", "peaks")),
        *((name, c_int64) for name in ("ranges", "total", "parts")),
        ("parallel_for", c_void_p),
    ]


def column_mass(request: MassRequest) -> tuple[Float[Tensor, "b h g t"], Float[Tensor, "w b h g t"]]:
    """As `reference.column_mass`."""
    check_mass(request)
    library, parallel_for = library_and_threads()
    map, widths = request.map, request.widths
    batch, heads, group, _, _ = map.query.shape
    total, bands, parts = map.keys.shape[2], len(widths), _parts(group)
    mass = torch.empty(batch, heads, group, total, **FLOAT)
    band = torch.empty(bands, batch, heads, group, total, **FLOAT)
    weights, positions = request.weights.float().contiguous(), request.positions.long().contiguous()
    for b in range(batch):
        own_widths = widths[:, b].long().contiguous()
        for h in range(heads):
            sums = torch.zeros(parts, group, total, **FLOAT)
            inside = torch.zeros(bands, parts, group, total, **FLOAT)
            for rows, _, block in _blocks(map, b, h):
                arguments = _ColumnMass(
                    block,
                    weights[b, rows].data_ptr(),
                    positions[b].data_ptr(),
                    own_widths.data_ptr(),
                    sums.data_ptr(),
                    inside.data_ptr(),
                    total,
                    bands,
                    parts,
                    parallel_for,
                )
                library.headwise_column_mass(ctypes.byref(arguments))
            mass[b, h], band[:, b, h] = sums.sum(dim=0), inside.sum(dim=1)
    return mass, band


def attention_and_peaks(request: PeaksRequest) -> tuple[Float[Tensor, "b h g q e"], Float[Tensor, "b h t"]]:
    """As `reference.attention_and_peaks`; both come from the same products."""
    check_peaks(request)
    library, parallel_for = library_and_threads()
    map, values = request.map, request.values
    batch, heads, group, _, _ = map.query.shape
    total, parts = map.keys.shape[2], _parts(group)
    ranges = torch.tensor([[part.start, part.stop] for part in request.counted], dtype=torch.long, device="cpu")
    output = torch.empty(*map.query.shape[:-1], values.shape[-1], dtype=values.dtype, device="cpu")
    peaks = torch.empty(batch, heads, total, **FLOAT)
    for b in range(batch):
        for h in range(heads):
            weighed = values[b, h].float()
            logarithms = torch.full((parts, group, total), -torch.inf, **FLOAT)
            for rows, products, block in _blocks(map, b, h):
                arguments = _AttentionPeaks(
                    block, ranges.data_ptr(), logarithms.data_ptr(), len(ranges), total, parts, parallel_for
                )
                library.headwise_attention_peaks(ctypes.byref(arguments))
                output[b, h, :, rows] = (products @ weighed[: products.shape[1]]).unflatten(0, (group, -1))
            peaks[b, h] = logarithms.amax(dim=(0, 1))
    return output, peaks.exp_()


def _blocks(map: AttentionMap, b: int, h: int) -> Iterator[tuple[slice, Float[Tensor, "rows seen"], _Block]]:
    """Products of one head of one sequence, some rows at a time; each block is valid until the next.

    One head at a time: the more rows of a head a block holds, the faster are the products.
    """
    query, keys, mask, options = map.query, map.keys, map.mask, map.options
    total, key_dim = keys.shape[2:]
    columns = map.own_columns().long().contiguous()
    transposed = keys[b, h].float().mT
    sinks = None if options.sinks is None else options.sinks[h].float().contiguous()
    marks = None if map.marks is None else map.marks.columns[b].contiguous()
    for block in query_blocks(query[b : b + 1, h : h + 1], total):
        own = columns[block]
        # Under causality no row of the block sees further than its last row.
        seen = total if mask is not None else int(own[-1]) + 1
        asked = (query[b, h, :, block].float() * options.scaling).reshape(-1, key_dim)
        visible = None if mask is None else mask[b, block]
        if visible is not None and visible.stride(-1) != 1:
            visible = visible.contiguous()
        gates = None if map.marks is None else map.marks.gates[b, h, :, block].contiguous()
        products = _scratch(len(asked) * seen).view(len(asked), seen)
        torch.mm(asked, transposed[:, :seen], out=products)
        yield (
            block,
            products,
            _Block(
                products.data_ptr(),
                own.data_ptr(),
                pointer(visible),
                pointer(sinks),
                pointer(marks),
                pointer(gates),
                query.shape[2],
                len(own),
                seen,
                0 if visible is None else visible.stride(0),
                options.softcap or 0.0,
            ),
        )


def _parts(group: int) -> int:
    """How often the rows of a lane are cut, such that there is enough to keep every thread equally busy."""
    return -(-8 * torch.get_num_threads() // group)


def _scratch(size: int) -> Tensor:
    """Memory of this thread that is used again and again: fresh pages from the system cost as much as the products."""
    held: Tensor | None = getattr(_kept, "scratch", None)
    if held is None or held.numel() < size:
        # It outlives an inference mode that may be on now.
        with torch.inference_mode(False):
            held = _kept.scratch = torch.empty(size, **FLOAT)
    return held[:size]


_kept = threading.local()
