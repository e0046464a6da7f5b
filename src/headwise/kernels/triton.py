"""Triton kernels: query rows and a layer's pages -> attention output, appended rows and column sums, on a GPU.

Decoding follows FlashAttention-2 (Dao 2023) inside a program and Flash-Decoding (Dao et al. 2023) between programs:
the kept rows of a head are split, each split makes a softmax of its own, and a second launch merges them. Nothing
waits for the device: grids and scratch follow from shapes and `PageView.longest` alone, so that a decode step can be
captured into a CUDA graph. Under TRITON_INTERPRET=1 the same code runs, slowly, on the CPU.
"""

from __future__ import annotations

import contextlib
import functools
import os
from types import ModuleType
from typing import Any

import torch

from headwise.types import Bool, Decoded, Float, Int, LogitOptions, PageView, Tensor

# Programs per processor that splitting aims at: two fit at a time, and heads differ in length, so that some of them
# end at once.
_PROGRAMS = 4
# Options of every launch. Triton 3.10 no longer joins products and sums by itself.
_LAUNCH = {"num_warps": 4, "enable_fp_fusion": True}

_LOG2_E = 1.4426950408889634


def obstacle(device: torch.device) -> str | None:
    """Why these kernels cannot run on that device; None where they can."""
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton runs on the CPU only where TRITON_INTERPRET=1 is set, for tests"
    if device.type not in ("cpu", "cuda"):
        return f"Triton kernels need a CUDA device, not {device.type!r}"
    try:
        _device_code()
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    return None


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
    """Attention of a few query rows over each KV head's own pages and over the fresh rows, in one softmax.

    Args:
        query: the newest tokens; the q-th is also the q-th last fresh row.
        pages: kept rows; n is `pages.longest`.
        fresh_keys, fresh_values: rows that are not in the pages yet.
        mask: True where a query may see a column; its last f columns are the fresh rows. None lets every query see
            all kept rows and the fresh rows up to its own.
        with_mass: whether to return the probabilities; they take q x (n + f) numbers per KV head.
    """
    batch, heads, group, queries, key_dim = query.shape
    fresh, value_dim = fresh_values.shape[2:]
    code, device = _device_code(), query.device
    query, fresh_keys, fresh_values = _rows(query), _rows(fresh_keys), _rows(fresh_values)
    mask = None if mask is None else _rows(mask)
    table, lengths, longest = pages.table.contiguous(), pages.lengths, pages.longest
    narrow = _narrow(query, pages.keys, pages.values, fresh_keys, fresh_values)
    tiles = _decode_tiles(group * queries, key_dim, value_dim, narrow)
    members = group * queries
    blocks = -(-members // tiles["BLOCK_M"])
    splits, split_rows = _splits(longest, batch * heads * blocks, tiles["BLOCK_N"], device)

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    partial = new(batch * heads, splits + 1, members, value_dim)
    partial_lse = new(batch * heads, splits + 1, members)
    logits = new(batch * heads, members, longest + fresh) if with_mass else None
    output = torch.empty(batch, heads, group, queries, value_dim, dtype=fresh_values.dtype, device=device)
    lse = new(batch, heads, group, queries)
    mass = new(batch, heads, queries, longest + fresh) if with_mass else None
    sinks = None if options.sinks is None else options.sinks.contiguous()
    with _on(device):
        code.attend[batch * heads, splits + 1, blocks](
            query,
            pages.keys,
            pages.values,
            pages.columns,
            table,
            lengths,
            fresh_keys,
            fresh_values,
            mask,
            partial,
            partial_lse,
            logits,
            query.stride(),
            lengths.stride(),
            fresh_keys.stride(),
            fresh_values.stride(),
            *_strides(mask),
            0 if mask is None else mask.shape[2] - fresh,
            heads,
            queries,
            fresh,
            splits,
            split_rows,
            longest,
            table.shape[2],
            *_factors(options),
            GROUP=group,
            PAGE=pages.keys.shape[1],
            NARROW=narrow,
            **tiles,
        )
        code.combine[(lse.numel(),)](
            partial,
            partial_lse,
            sinks,
            output,
            lse,
            heads,
            queries,
            splits + 1,
            GROUP=group,
            E=value_dim,
            BLOCK_E=tiles["BLOCK_E"],
            BLOCK_S=32,
            **_LAUNCH,
        )
        if mass is None:
            return Decoded(output, lse, None, None)
        code.weigh[batch * heads * queries, -(-mass.shape[-1] // 512)](
            logits,
            lse,
            lengths,
            mass,
            lengths.stride(),
            heads,
            queries,
            longest,
            fresh,
            GROUP=group,
            BLOCK_N=512,
            **_LAUNCH,
        )
    return Decoded(output, lse, mass[..., :longest], mass[..., longest:])


def append(
    pages: PageView,
    keys: Float[Tensor, "b h f d"],
    values: Float[Tensor, "b h f e"],
    columns: Int[Tensor, " f"],
    real: Bool[Tensor, "b f"] | None,
    scores: Float[Tensor, "b h f"] | None,
    increments: Float[Tensor, "b h n"] | None,
) -> None:
    """Write rows behind the kept ones of every head, and count them in `pages.lengths`, in place.

    The pages for them must be in the table already. Nothing waits for the device.

    Args:
        real: rows to write, the same in every head; None means all of them.
        scores: of the new rows, where the pages carry scores.
        increments: to add to the scores of the rows already there; ignored beyond a head's length.
    """
    batch, heads, fresh, key_dim = keys.shape
    assert pages.scores is not None or increments is None
    assert pages.scores is None or scores is not None
    keys, values, table = _rows(keys), _rows(values), pages.table.contiguous()
    scores, increments = (None if one is None else _rows(one) for one in (scores, increments))
    tiles = _append_tiles(fresh, key_dim, values.shape[3])
    fresh_blocks = -(-fresh // tiles["BLOCK_F"])
    more = 0 if increments is None else increments.shape[2]
    blocks = fresh_blocks + -(-more // tiles["BLOCK_N"])
    if blocks == 0:
        return
    with _on(keys.device):
        _device_code().write[batch * heads, blocks](
            pages.keys,
            pages.values,
            pages.columns,
            pages.scores,
            table,
            pages.lengths,
            keys,
            values,
            columns.contiguous(),
            real,
            scores,
            increments,
            pages.lengths.stride(),
            keys.stride(),
            values.stride(),
            *_strides(real),
            *_strides(scores),
            *_strides(increments),
            heads,
            fresh,
            fresh_blocks,
            more,
            table.shape[2],
            PAGE=pages.keys.shape[1],
            COUNT=blocks == 1,
            **tiles,
        )
    if blocks > 1:
        pages.lengths.add_(fresh if real is None else real.sum(dim=1, keepdim=True))


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
    """Weighted column sums of the attention map, tile by tile: memory grows with t, not with t x t.

    Args:
        columns: each query row's own column, ascending.
        mask: True where a query may see a key; None means causal.
        weights: how much each query row counts.
        positions: of every column, ascending; a key is in the band where the query is less than the width ahead of it.
        widths: of the bands, for every sequence.

    Returns:
        the mass on every column, and the part of it inside each band, in fp32.
    """
    batch, heads, group, rows, key_dim = query.shape
    total, device = keys.shape[2], keys.device
    query, keys, columns, positions = _rows(query), _rows(keys), columns.contiguous(), positions.contiguous()
    mask = None if mask is None else _rows(mask)
    sinks = None if options.sinks is None else options.sinks.contiguous()
    narrow = _narrow(query, keys)
    tiles = _map_tiles(group, key_dim, narrow)
    blocks = -(-total // tiles["BLOCK_N"])
    members = batch * heads * group
    lse = torch.empty(members, rows, dtype=torch.float32, device=device)
    mass = torch.empty(batch, heads, group, total, dtype=torch.float32, device=device)
    band = mass.new_empty(len(widths), *mass.shape)
    first = torch.arange(0, total, tiles["BLOCK_N"], dtype=columns.dtype, device=device)
    row_positions = positions.index_select(1, columns) if len(widths) else None
    stops = None
    if row_positions is not None and len(widths) > 1:
        last = positions[:, (first + tiles["BLOCK_N"] - 1).clamp(max=total - 1)]
        beyond = (last + widths.to(positions.dtype)[:, :, None]).transpose(0, 1).flatten(1)
        stops = torch.searchsorted(row_positions, beyond).view(batch, len(widths), blocks).transpose(0, 1).contiguous()
    common = (query.stride(), keys.stride(), *_strides(mask))
    with _on(device):
        code = _map_code()
        code.row_sums[-(-rows // tiles["BLOCK_M"]), members](
            query,
            keys,
            columns,
            mask,
            sinks,
            lse,
            *common,
            heads,
            rows,
            total,
            *_factors(options),
            NARROW=narrow,
            **tiles,
        )
        code.column_sums[blocks, members, max(1, len(widths))](
            query,
            keys,
            columns,
            mask,
            lse,
            weights.contiguous(),
            row_positions,
            positions,
            widths.contiguous(),
            torch.searchsorted(columns, first) if mask is None else None,
            stops,
            mass,
            band if len(widths) else None,
            *common,
            batch,
            heads,
            rows,
            total,
            *_factors(options),
            NARROW=narrow,
            **tiles,
        )
    return mass, band


@functools.cache
def _device_code() -> ModuleType:
    from headwise.kernels import triton_device

    return triton_device


@functools.cache
def _map_code() -> ModuleType:
    from headwise.kernels import triton_map

    return triton_map


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which is not the tensors' where a model is spread over several."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _splits(longest: int, programs: int, block: int, device: torch.device) -> tuple[int, int]:
    """How many splits, and of how many rows each, where one split takes that many programs."""
    wanted = max(1, -(-_PROGRAMS * _processors(device) // programs))
    rows = max(1, -(-longest // (wanted * block))) * block
    return -(-longest // rows), rows


def _rows(tensor: Tensor) -> Tensor:
    """The same numbers with the last axis dense, as the kernels read it; hardly ever a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _narrow(*operands: Tensor) -> bool:
    """Whether products may go to the tensor cores as they are: all in one 16-bit type, summed in fp32."""
    dtype = operands[0].dtype
    if dtype == torch.bfloat16:
        # The interpreter multiplies the bits of bfloat16 as if they were integers.
        return all(other.dtype == dtype for other in operands) and not _interpreted()
    return dtype == torch.float16 and all(other.dtype == dtype for other in operands)


@functools.cache
def _interpreted() -> bool:
    import triton

    return not isinstance(_device_code().attend, triton.JITFunction)


def _strides(tensor: Tensor | None) -> tuple[int, int]:
    """Of the first two axes, or any numbers where there is no tensor."""
    return (0, 0) if tensor is None else (tensor.stride(0), tensor.stride(1))


def _factors(options: LogitOptions) -> tuple[float, float | None]:
    """Factors inside and outside of a soft cap that make logits in base 2."""
    if options.softcap is None:
        return options.scaling * _LOG2_E, None
    return options.scaling / options.softcap, options.softcap * _LOG2_E


def _power(number: int, least: int = 16) -> int:
    """The next power of two; a tensor core's tile takes 16 at least."""
    return max(least, 1 << (number - 1).bit_length())


# Tile sizes depend on nothing that changes from token to token, so each is worked out once. By the compiler's account
# for sm_90, registers hardly spill, and two programs of a decode step share a processor.


@functools.cache
def _decode_tiles(members: int, key_dim: int, value_dim: int, narrow: bool) -> dict[str, int]:
    width = max(_power(key_dim), _power(value_dim))
    sizes = _LAUNCH | {"D": key_dim, "E": value_dim, "BLOCK_D": _power(key_dim), "BLOCK_E": _power(value_dim)}
    if not narrow:
        rows = 32 if width <= 64 else 16
        return sizes | {"BLOCK_M": min(_power(members, 1), 8), "BLOCK_N": rows, "num_warps": 8}
    # The addresses of the rows are loaded before the rows, which takes the pipeline one stage more than usual.
    if width <= 128:
        warps = 4 if members <= 32 else 8
        return sizes | {"BLOCK_M": min(_power(members), 64), "BLOCK_N": 64, "num_stages": 4, "num_warps": warps}
    return sizes | {"BLOCK_M": min(_power(members), 32), "BLOCK_N": 32, "num_stages": 3}


@functools.cache
def _append_tiles(fresh: int, key_dim: int, value_dim: int) -> dict[str, int]:
    sizes = _LAUNCH | {"D": key_dim, "E": value_dim, "BLOCK_D": _power(key_dim), "BLOCK_E": _power(value_dim)}
    return sizes | {"BLOCK_F": 1 if fresh == 1 else 16, "BLOCK_N": 1024}


@functools.cache
def _map_tiles(group: int, key_dim: int, narrow: bool) -> dict[str, int]:
    sizes = _LAUNCH | {"GROUP": group, "D": key_dim, "BLOCK_M": 64, "num_stages": 3}
    if narrow:
        return sizes | {"BLOCK_N": 64, "BLOCK_D": _power(key_dim)}
    # A product in full fp32 wants a row and a column of its operands in registers: so few features at a time.
    return sizes | {"BLOCK_N": 32, "BLOCK_D": 16, "num_warps": 8}
