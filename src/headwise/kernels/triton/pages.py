"""Triton kernels: query rows and a layer's pages -> attention output, appended rows and column sums, on a GPU.

Decoding follows FlashAttention-2 (Dao 2023) inside a program and Flash-Decoding (Dao et al. 2023) between programs:
the kept rows of a head are split, each split makes a softmax of its own, and a second launch merges them. Nothing
waits for the device: grids and scratch follow from shapes and `PageView.longest` alone, so that a decode step can be
captured into a CUDA graph. Under TRITON_INTERPRET=1 the same code runs, slowly, on the CPU.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

import torch

from headwise.kernels.triton.codes import attend_codes, code_tiles, is_half, packing_of, rotation_of, turning
from headwise.kernels.triton.launch import (
    LAUNCH,
    dense_rows,
    device_code,
    factors,
    is_narrow,
    on_device,
    power,
    strides,
)
from headwise.kernels.triton.map import attention_and_peaks, column_mass, column_max
from headwise.types import Bool, Decoded, Float, Int, LogitOptions, PageView, Tensor, UInt8

# Programs per processor that splitting aims at: two fit at a time, and heads differ in length, so that some of them
# end at once.
_PROGRAMS = 4


def obstacle(device: torch.device) -> str | None:
    """Why these kernels cannot run on that device; None where they can."""
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton runs on the CPU only where TRITON_INTERPRET=1 is set, for tests"
    if device.type not in ("cpu", "cuda"):
        return f"Triton kernels need a CUDA device, not {device.type!r}"
    try:
        device_code()
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    return None


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
    """Attention of a few query rows over each KV head's own pages and over the fresh rows, in one softmax.

    Args:
        query: the newest tokens; the q-th is also the q-th last fresh row.
        pages: kept rows, the exact ones first; n is the sum of what is `longest` in each. All codes are turned by the
            same rotations.
        fresh_keys, fresh_values: rows that are not in the pages yet.
        mask: True where a query may see a column; its last f columns are the fresh rows. None lets every query see
            all kept rows and the fresh rows up to its own.
        with_mass: whether to return the probabilities; they take q x (n + f) numbers per KV head.
    """
    coded = [view for view in pages[1:] if view.longest]
    exact = pages[0]
    batch, heads, group, queries, key_dim = query.shape
    fresh, value_dim = fresh_values.shape[2:]
    code, device = device_code(), query.device
    query, fresh_keys, fresh_values = dense_rows(query), dense_rows(fresh_keys), dense_rows(fresh_values)
    mask = None if mask is None else dense_rows(mask)
    table, lengths = exact.table.contiguous(), exact.lengths
    narrow = is_narrow(query, exact.keys, exact.values, fresh_keys, fresh_values)
    members = group * queries
    tiles = [_decode_tiles(members, key_dim, value_dim, narrow)]
    for packing in map(packing_of, coded):
        bits = packing.key_bits, packing.value_bits
        tiles.append(code_tiles(members, key_dim, value_dim, *bits, is_half(query)))
    cuts = []
    for view, sizes in zip([exact, *coded], tiles, strict=True):
        programs = batch * heads * -(-members // sizes["BLOCK_M"])
        cuts.append(_splits(view.longest, programs, sizes["BLOCK_N"], device))
    # Parts are the splits of the exact rows, the fresh rows, and the splits of each view of codes.
    splits, split_rows = cuts[0]
    parts = 1 + sum(count for count, _ in cuts)
    kept = exact.longest + sum(view.longest for view in coded)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    partial, partial_lse = new(batch * heads, parts, members, value_dim), new(batch * heads, parts, members)
    output, lse = new(*query.shape[:-1], value_dim, dtype=fresh_values.dtype), new(*query.shape[:-1])
    logits = spans = mass = None
    if with_mass:
        logits, mass = new(batch * heads, members, kept + fresh), new(batch, heads, queries, kept + fresh)
        spans = new(batch * heads, 1 + len(coded), 2, dtype=torch.int32)
    sinks = None if options.sinks is None else options.sinks.contiguous()
    mask_b, mask_q = strides(mask)
    inner, outer = factors(options)
    every = {
        "mask": mask,
        "partial": partial,
        "partial_lse": partial_lse,
        "logits": logits,
        "spans": spans,
        "mask_b": mask_b,
        "mask_q": mask_q,
        "heads": heads,
        "queries": queries,
        "fresh": fresh,
        "parts": parts,
        "kept": kept,
        "views": 1 + len(coded),
        "inner": inner,
        "outer": outer,
        "GROUP": group,
    }
    with on_device(device):
        code.attend[batch * heads, splits + 1, -(-members // tiles[0]["BLOCK_M"])](
            query,
            exact.keys,
            exact.values,
            exact.columns,
            table,
            lengths,
            fresh_keys,
            fresh_values,
            query_stride=query.stride(),
            length_stride=lengths.stride(),
            key_stride=fresh_keys.stride(),
            value_stride=fresh_values.stride(),
            unseen=0 if mask is None else mask.shape[2] - fresh,
            splits=splits,
            split_rows=split_rows,
            pages=table.shape[2],
            PAGE=exact.columns.shape[1],
            NARROW=narrow,
            **tiles[0],
            **every,
        )
        attend_codes(query, coded, tiles[1:], cuts[1:], splits + 1, exact.longest, every)
        code.combine[(lse.numel(),)](
            partial,
            partial_lse,
            sinks,
            rotation_of(coded, "value_rotation"),
            output,
            lse,
            heads,
            queries,
            parts,
            splits + 1,
            GROUP=group,
            E=value_dim,
            BLOCK_E=tiles[0]["BLOCK_E"],
            BLOCK_S=32,
            **(turning(value_dim) if coded else LAUNCH),
        )
        if mass is None:
            return Decoded(output, lse, None, None)
        code.weigh[batch * heads * queries, -(-mass.shape[-1] // 512)](
            logits, lse, spans, mass, queries, kept, fresh, 1 + len(coded), GROUP=group, BLOCK_N=512, **LAUNCH
        )
    return Decoded(output, lse, mass[..., :kept], mass[..., kept:])


def append(
    pages: PageView,
    keys: Float[Tensor, "b h f d"] | UInt8[Tensor, "b h f kc"],
    values: Float[Tensor, "b h f e"] | UInt8[Tensor, "b h f vc"],
    columns: Int[Tensor, " f"],
    real: Bool[Tensor, "b f"] | None,
    scores: Float[Tensor, "b h f"] | None,
    increments: Float[Tensor, "b h n"] | None,
) -> None:
    """Write rows behind the kept ones of every head, and count them in `pages.lengths`, in place.

    The pages for them must be in the table already. Nothing waits for the device.

    Args:
        keys, values: numbers, or codes where there are none to write.
        real: rows to write, the same in every head; None means all of them.
        scores: of the new rows, where the pages carry scores.
        increments: to add to the scores of the rows already there; ignored beyond a head's length.
    """
    batch, heads, fresh, key_dim = keys.shape
    assert pages.scores is not None or increments is None
    assert pages.scores is None or scores is not None
    keys, values, table = dense_rows(keys), dense_rows(values), pages.table.contiguous()
    scores, increments = (None if one is None else dense_rows(one) for one in (scores, increments))
    tiles = _append_tiles(fresh, key_dim, values.shape[3])
    fresh_blocks = -(-fresh // tiles["BLOCK_F"])
    more = 0 if increments is None else increments.shape[2]
    blocks = fresh_blocks + -(-more // tiles["BLOCK_N"])
    if blocks == 0:
        return
    with on_device(keys.device):
        device_code().write[batch * heads, blocks](
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
            *strides(real),
            *strides(scores),
            *strides(increments),
            heads,
            fresh,
            fresh_blocks,
            more,
            table.shape[2],
            PAGE=pages.keys.shape[1],
            COUNT=blocks == 1,
            **tiles,
        )
    if fresh and blocks > 1:
        pages.lengths.add_(fresh if real is None else real.sum(dim=1, keepdim=True))


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _splits(longest: int, programs: int, block: int, device: torch.device) -> tuple[int, int]:
    """How many splits, and of how many rows each, where one split takes that many programs."""
    wanted = max(1, -(-_PROGRAMS * _processors(device) // programs))
    rows = max(1, -(-longest // (wanted * block))) * block
    return -(-longest // rows), rows


# Tile sizes depend on nothing that changes from token to token, so each is worked out once. By the compiler's account
# for sm_90, registers hardly spill, and two programs of a decode step share a processor.


@functools.cache
def _decode_tiles(members: int, key_dim: int, value_dim: int, narrow: bool) -> dict[str, int]:
    width = max(power(key_dim), power(value_dim))
    sizes = LAUNCH | {"D": key_dim, "E": value_dim, "BLOCK_D": power(key_dim), "BLOCK_E": power(value_dim)}
    if not narrow:
        rows = 32 if width <= 64 else 16
        return sizes | {"BLOCK_M": min(power(members, 1), 8), "BLOCK_N": rows, "num_warps": 8}
    # The addresses of the rows are loaded before the rows, which takes the pipeline one stage more than usual.
    if width <= 128:
        warps = 4 if members <= 32 else 8
        return sizes | {"BLOCK_M": min(power(members), 64), "BLOCK_N": 64, "num_stages": 4, "num_warps": warps}
    return sizes | {"BLOCK_M": min(power(members), 32), "BLOCK_N": 32, "num_stages": 3}


@functools.cache
def _append_tiles(fresh: int, key_dim: int, value_dim: int) -> dict[str, int]:
    sizes = LAUNCH | {"D": key_dim, "E": value_dim, "BLOCK_D": power(key_dim), "BLOCK_E": power(value_dim)}
    return sizes | {"BLOCK_F": 1 if fresh == 1 else 16, "BLOCK_N": 1024}


__all__ = ["append", "attention_and_peaks", "column_mass", "column_max", "obstacle", "ragged_decode"]
