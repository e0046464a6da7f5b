"""Triton columns: launches the kernels of `device_map`, which sum up the columns of attention maps."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType

import torch

from headwise.kernels.reference import attend_and_gather
from headwise.kernels.triton.launch import LAUNCH, dense_rows, factors, is_narrow, on_device, power, strides
from headwise.types import Bool, Float, Int, LogitOptions, Tensor


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
    band = torch.empty(len(widths), *query.shape[:3], keys.shape[2], dtype=torch.float32, device=keys.device)
    mass = _columns_of_map(query, keys, columns, mask, options, weights, positions.contiguous(), widths, band)
    return mass, band


def attention_and_peaks(
    query: Float[Tensor, "b h g q d"],
    keys: Float[Tensor, "b h t d"],
    values: Float[Tensor, "b h t e"],
    mask: Bool[Tensor, "b q t"] | None,
    options: LogitOptions,
    counted: Sequence[slice],
) -> tuple[Float[Tensor, "b h g q e"], Float[Tensor, "b h t"]]:
    """As `headwise.kernels.reference.attention_and_peaks`; the attention is torch's."""
    return attend_and_gather(query, keys, values, mask, options, counted, column_max)


def column_max(
    query: Float[Tensor, "b h g q d"],
    keys: Float[Tensor, "b h t d"],
    columns: Int[Tensor, " q"],
    mask: Bool[Tensor, "b q t"] | None,
    options: LogitOptions,
) -> Float[Tensor, "b h t"]:
    """Largest number in each column of the attention maps of a group, 0 where no row sees it."""
    positions, widths = columns.expand(len(keys), -1), columns.new_empty(0, len(keys))
    band = torch.empty(0, *query.shape[:3], keys.shape[2], device=keys.device)
    return _columns_of_map(query, keys, columns, mask, options, None, positions, widths, band).amax(dim=2)


def _columns_of_map(
    query: Float[Tensor, "b h g q d"],
    keys: Float[Tensor, "b h t d"],
    columns: Int[Tensor, " q"],
    mask: Bool[Tensor, "b q t"] | None,
    options: LogitOptions,
    weights: Float[Tensor, "b q"] | None,
    positions: Int[Tensor, "b positions"],
    widths: Int[Tensor, "w b"],
    band: Float[Tensor, "w b h g t"],
) -> Float[Tensor, "b h g t"]:
    """Sums of the columns, in each band written to `band`, and in total; the largest of them where no weights are."""
    batch, heads, group, rows, key_dim = query.shape
    total, device = keys.shape[2], keys.device
    query, keys, columns = dense_rows(query), dense_rows(keys), columns.contiguous()
    mask = None if mask is None else dense_rows(mask)
    sinks = None if options.sinks is None else options.sinks.contiguous()
    narrow = is_narrow(query, keys)
    tiles = _map_tiles(group, key_dim, narrow)
    blocks = -(-total // tiles["BLOCK_N"])
    members = batch * heads * group
    lse = torch.empty(members, rows, dtype=torch.float32, device=device)
    mass = torch.empty(batch, heads, group, total, dtype=torch.float32, device=device)
    first = torch.arange(0, total, tiles["BLOCK_N"], dtype=columns.dtype, device=device)
    row_positions = positions.index_select(1, columns) if len(widths) else None
    stops = None
    if row_positions is not None and len(widths) > 1:
        last = positions[:, (first + tiles["BLOCK_N"] - 1).clamp(max=total - 1)]
        beyond = (last + widths.to(positions.dtype)[:, :, None]).transpose(0, 1).flatten(1)
        stops = torch.searchsorted(row_positions, beyond).view(batch, len(widths), blocks).transpose(0, 1).contiguous()
    common = (query.stride(), keys.stride(), *strides(mask))
    with on_device(device):
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
            *factors(options),
            NARROW=narrow,
            **tiles,
        )
        code.column_sums[blocks, members, max(1, len(widths))](
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
            *factors(options),
            NARROW=narrow,
            **tiles,
        )
    return mass


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
