"""Compiled CPU attention over whole prompts: queries, keys and values -> its output, and what every column gets."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass

import torch

from headwise.kernels.check import check_attention, check_mass, check_peaks
from headwise.kernels.cpu.library import FLOAT, library_and_threads, pointer
from headwise.kernels.cpu.structs import TYPES
from headwise.kernels.interface import AttentionMap, MassRequest, PeaksRequest
from headwise.types import Float, Tensor

# That the query rows are dealt to, for every thread: threads that are held up take fewer.
_PARTS = 4

# Of a thread, from call to call.
_KEPT_BYTES = 32 * 2**20


class _Attention(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("query", "keys", "values", "own", "mask", "sinks", "marks", "gates")),
        *((name, c_void_p) for name in ("output", "weights", "positions", "widths", "mass", "band")),
        *((name, c_void_p) for name in ("counted", "peaks")),
        *((name, c_int64) for name in ("type", "heads", "group", "rows", "total", "key_dim", "value_dim")),
        *((name, c_int64) for name in ("bands", "ranges", "parts", "shares")),
        ("query_strides", c_int64 * 3),
        ("key_strides", c_int64 * 2),
        ("value_strides", c_int64 * 2),
        ("output_strides", c_int64 * 3),
        ("gate_strides", c_int64 * 3),
        ("mask_stride", c_int64),
        ("scaling", c_float),
        ("softcap", c_float),
        ("memory", c_void_p),
        ("parallel_for", c_void_p),
    ]


@dataclass(frozen=True)
class _Found:
    """What comes of one call, as the functions below give it; of what was not asked for, there are no numbers in it."""

    output: Tensor
    mass: Tensor
    band: Tensor
    peaks: Tensor


def attention(map: AttentionMap, values: Float[Tensor, "b h t e"]) -> Float[Tensor, "b h g q e"]:
    """As `headwise.kernels.attention.dense_attention`."""
    check_attention(map, values)
    return _attend(map, values).output


def attention_and_mass(
    request: MassRequest, values: Float[Tensor, "b h t e"]
) -> tuple[Float[Tensor, "b h g q e"], Float[Tensor, "b h g t"], Float[Tensor, "w b h g t"]]:
    """As `reference.attention_and_mass`; all of it comes from the same products."""
    check_mass(request)
    check_attention(request.map, values)
    found = _attend(request.map, values, request)
    return found.output, found.mass, found.band


def column_mass(request: MassRequest) -> tuple[Float[Tensor, "b h g t"], Float[Tensor, "w b h g t"]]:
    """As `reference.column_mass`."""
    check_mass(request)
    found = _attend(request.map, None, request)
    return found.mass, found.band


def attention_and_peaks(request: PeaksRequest) -> tuple[Float[Tensor, "b h g q e"], Float[Tensor, "b h t"]]:
    """As `reference.attention_and_peaks`; both come from the same products."""
    check_peaks(request)
    found = _attend(request.map, request.values, counted=request.counted)
    return found.output, found.peaks


def _attend(
    map: AttentionMap, values: Tensor | None, mass: MassRequest | None = None, counted: Sequence[slice] | None = None
) -> _Found:
    (batch, heads, group, rows, _), total = map.query.shape, map.keys.shape[2]
    value_dim, bands = 0 if values is None else values.shape[-1], 0 if mass is None else len(mass.widths)
    dtype = map.keys.dtype if values is None else values.dtype
    # As a host puts the heads beside one another again, of every token.
    output = torch.empty(batch, rows, heads, group, value_dim, dtype=dtype, device="cpu").permute(0, 2, 3, 1, 4)
    lanes = (heads, group, total) if mass is not None else (0, 0, 0)
    found = _Found(
        output,
        torch.empty(batch, *lanes, **FLOAT),
        torch.empty(batch, bands, *lanes, **FLOAT),
        torch.empty(batch, heads, total if counted is not None else 0, **FLOAT),
    )
    if rows == 0:
        return _Found(found.output, found.mass.zero_(), found.band.zero_().movedim(1, 0), found.peaks.zero_())
    own = map.own_columns().long().contiguous()
    ranges = torch.tensor([[p.start, p.stop] for p in counted or ()], dtype=torch.long, device="cpu")
    for b in range(batch):
        _attend_one(map, values, mass, ranges if counted is not None else None, own, found, b)
    return _Found(found.output, found.mass, found.band.movedim(1, 0), found.peaks)


def _attend_one(
    map: AttentionMap,
    values: Tensor | None,
    mass: MassRequest | None,
    ranges: Tensor | None,
    own: Tensor,
    found: _Found,
    b: int,
) -> None:
    """One sequence, into its part of what is found."""
    library, parallel_for = library_and_threads()
    _, heads, group, rows, key_dim = map.query.shape
    dtype = map.keys.dtype if map.keys.dtype in TYPES else torch.float32
    query, keys, own_values = _dense(map.query[b], dtype), _dense(map.keys[b], dtype), None
    output = None
    if values is not None:
        own_values = _dense(values[b], dtype)
        output = found.output[b] if found.output.dtype is torch.float32 else torch.empty(found.output[b].shape, **FLOAT)
    visible = None if map.mask is None else _dense(map.mask[b], torch.bool)
    sinks = None if map.options.sinks is None else map.options.sinks.float().contiguous()
    marks = None if map.marks is None else map.marks.columns[b].contiguous()
    gates = None if map.marks is None else map.marks.gates[b]
    weights, positions, widths = (None, None, None) if mass is None else _counts(mass, b)
    threads = torch.get_num_threads()
    arguments = _Attention(
        query.data_ptr(),
        keys.data_ptr(),
        pointer(own_values),
        own.data_ptr(),
        pointer(visible),
        pointer(sinks),
        pointer(marks),
        pointer(gates),
        pointer(output),
        pointer(weights),
        pointer(positions),
        pointer(widths),
        found.mass[b].data_ptr(),
        found.band[b].data_ptr(),
        pointer(ranges),
        None if ranges is None else found.peaks[b].data_ptr(),
        TYPES[dtype],
        heads,
        group,
        rows,
        keys.shape[1],
        key_dim,
        0 if own_values is None else own_values.shape[-1],
        0 if mass is None else len(mass.widths),
        0 if ranges is None else len(ranges),
        _PARTS * threads,
        threads,
        query.stride()[:3],
        keys.stride()[:2],
        (0, 0) if own_values is None else own_values.stride()[:2],
        (0, 0, 0) if output is None else output.stride()[:3],
        (0, 0, 0) if gates is None else gates.stride(),
        0 if visible is None else visible.stride(0),
        map.options.scaling,
        map.options.softcap or 0.0,
        None,
        parallel_for,
    )
    memory = _scratch(library.headwise_attention(ctypes.byref(arguments)))
    arguments.memory = memory.data_ptr()
    library.headwise_attention(ctypes.byref(arguments))
    if output is not None and found.output.dtype is not torch.float32:
        found.output[b].copy_(output)


def _counts(mass: MassRequest, b: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, positions and widths of one sequence."""
    weights, positions, widths = mass.weights[b].float(), mass.positions[b].long(), mass.widths[:, b].long()
    return weights.contiguous(), positions.contiguous(), widths.contiguous()


def _dense(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In that type, with the numbers of a row side by side."""
    if tensor.dtype is not dtype or tensor.stride(-1) != 1:
        return tensor.to(dtype).contiguous()
    return tensor


def _scratch(size: int) -> Tensor:
    """Memory of this thread that is used again and again: fresh pages from the system cost as much as the products.

    What a long prompt needs is not kept.
    """
    held: Tensor | None = getattr(_kept, "scratch", None)
    if held is not None and held.numel() >= size:
        return held
    # It outlives an inference mode that may be on now.
    with torch.inference_mode(False):
        made = torch.empty(size, **FLOAT)
    if made.nbytes <= _KEPT_BYTES:
        _kept.scratch = made
    return made


_kept = threading.local()
