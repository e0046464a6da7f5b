"""Triton columns: launches the kernels of `device_map`, which sum up the columns of attention maps."""

from __future__ import annotations

import functools
from types import ModuleType

import torch

from headwise.kernels.check import check_mass, check_peaks
from headwise.kernels.interface import AttentionMap, MassRequest, PeaksRequest
from headwise.kernels.reference import attend_and_gather
from headwise.kernels.triton.launch import LAUNCH, dense_rows, factors, is_narrow, on_device, power, strides, told_of
from headwise.types import Float, Int, Tensor


def column_mass(request: MassRequest) -> tuple[Float[Tensor, "b h g t"], Float[Tensor, "w b h g t"]]:
    """As `reference.column_mass`, tile by tile."""
    check_mass(request)
    map, widths = request.map, request.widths
    band = torch.empty(
        len(widths), *map.query.shape[:3], map.keys.shape[2], dtype=torch.float32, device=map.keys.device
    )
    return _columns_of_map(map, request.weights, request.positions.contiguous(), widths, band), band


def attention_and_peaks(request: PeaksRequest) -> tuple[Float[Tensor, "b h g q e"], Float[Tensor, "b h t"]]:
    """As `reference.attention_and_peaks`; the attention is torch's."""
    check_peaks(request)
    return attend_and_gather(request, column_max)


def column_max(map: AttentionMap) -> Float[Tensor, "b h t"]:
    """Largest number in each column of the attention maps of a group, 0 where no row sees it."""
    columns = map.own_columns()
    positions, widths = columns.expand(len(map.keys), -1), columns.new_empty(0, len(map.keys))
    band = torch.empty(0, *map.query.shape[:3], map.keys.shape[2], dtype=torch.float32, device=map.keys.device)
    return _columns_of_map(map, None, positions, widths, band).amax(dim=2)


def _columns_of_map(
    map: AttentionMap,
    weights: Float[Tensor, "b q"] | None,
    positions: Int[Tensor, "b positions"],
    widths: Int[Tensor, "w b"],
    band: Float[Tensor, "w b h g t"],
) -> Float[Tensor, "b h g t"]:
    """Sums of the columns, in each band written to `band`, and in total; the largest of them where no weights are."""
    batch, heads, group, rows, key_dim = map.query.shape
    total, device = map.keys.shape[2], map.keys.device
    query, keys, columns = dense_rows(map.query), dense_rows(map.keys), map.own_columns().contiguous()
    mask = None if map.mask is None else dense_rows(map.mask)
    sinks = None if map.options.sinks is None else map.options.sinks.contiguous()
    narrow = is_narrow(query, keys)
    tiles = _map_tiles(group, key_dim, narrow)
    members = batch * heads * group
    lse = torch.empty(members, rows, dtype=torch.float32, device=device)
    mass = torch.empty(batch, heads, group, total, dtype=torch.float32, device=device)
    first = torch.arange(0, total, tiles["BLOCK_N"], dtype=columns.dtype, device=device)
    row_positions = positions.index_select(1, columns) if len(widths) else None
    stops = None if row_positions is None else _last_rows(row_positions, positions, first, widths, tiles["BLOCK_N"])
    common = (query.stride(), keys.stride(), *strides(mask))
    named = {**told_of(map.marks), "NARROW": narrow, **tiles}
    logits = factors(map.options)
    with on_device(device):
        code = _map_code()
        code.row_sums[-(-rows // tiles["BLOCK_M"]), members](
            query, keys, columns, mask, sinks, lse, *common, heads, rows, total, *logits, **named
        )
        code.column_sums[len(first), members, max(1, len(widths))](
            query,
            keys,
            columns,
            mask,
            lse,
            None if weights is None else weights.contiguous(),
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
            *logits,
            **named,
        )
    return mass


def _last_rows(
    row_positions: Int[Tensor, "b q"],
    positions: Int[Tensor, "b positions"],
    first: Int[Tensor, " blocks"],
    widths: Int[Tensor, "w b"],
    block: int,
) -> Int[Tensor, "w b blocks"] | None:
    """First row from which on no column of each block is in each band; None where one band goes with the total."""
    if len(widths) < 2:
        return None
    last = positions[:, (first + block - 1).clamp(max=positions.shape[1] - 1)]
    beyond = (last + widths.to(positions.dtype)[:, :, None]).transpose(0, 1).flatten(1).contiguous()
    found = torch.searchsorted(row_positions, beyond).view(len(positions), len(widths), len(first))
    return found.transpose(0, 1).contiguous()


@functools.cache
def _map_code() -> ModuleType:
    from headwise.kernels.triton import device_map

    return device_map


@functools.cache
def _map_tiles(group: int, key_dim: int, narrow: bool) -> dict[str, int]:
    sizes = LAUNCH | {"GROUP": group, "D": key_dim, "BLOCK_M": 64, "num_stages": 3}
    if narrow:
        return sizes | {"BLOCK_N": 64, "BLOCK_D": power(key_dim)}
    # A product in full fp32 wants a row and a column of its operands in registers: so few features at a time.
    return sizes | {"BLOCK_N": 32, "BLOCK_D": 16, "num_warps": 8}
