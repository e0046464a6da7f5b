"""5/7 decode: queries of new tokens over each head's kept rows -> attention output and the mass on every row."""

from __future__ import annotations

import torch

from headwise.kernels import Kernels
from headwise.kernels.attention import query_blocks
from headwise.store.store import RowStore
from headwise.types import Bool, Decoded, Float, LogitOptions, Tensor


def decode(
    query: Float[Tensor, "b h g q d"],
    store: RowStore,
    fresh_keys: Float[Tensor, "b h f d"],
    fresh_values: Float[Tensor, "b h f e"],
    mask: Bool[Tensor, "b q t"] | None,
    options: LogitOptions,
    *,
    with_mass: bool,
    kernels: Kernels,
) -> Decoded:
    """Attend with the newest q tokens over the store and over the fresh rows, whose last q are their own.

    Args:
        mask: True where a query may see a column; its last f columns are the fresh ones. None means causal.
        with_mass: whether to return the probabilities; they take q x (n + f) numbers per KV head.
    """
    queries, fresh = query.shape[3], fresh_keys.shape[2]
    pages = store.view()
    blocks = list(query_blocks(query, store.longest + fresh))
    if len(blocks) == 1:
        return kernels.ragged_decode(query, pages, fresh_keys, fresh_values, mask, options, with_mass=with_mass)
    parts = []
    for block in blocks:
        # Without a mask a query sees the fresh rows up to its own, which is the last that its block is given.
        upto = fresh if mask is not None else fresh - queries + block.stop
        parts.append(
            kernels.ragged_decode(
                query[:, :, :, block],
                pages,
                fresh_keys[:, :, :upto],
                fresh_values[:, :, :upto],
                None if mask is None else mask[:, block],
                options,
                with_mass=with_mass,
            )
        )
    return _joined(parts, fresh)


def received(mass: Float[Tensor, "b h q n"], real: Bool[Tensor, "b q"] | None) -> Float[Tensor, "b h n"]:
    """Mass from all query rows; a padding query attends to nothing that counts."""
    if real is not None:
        mass = mass * real[:, None, :, None]
    return mass[:, :, 0] if mass.shape[2] == 1 else mass.sum(dim=2)


def _joined(parts: list[Decoded], fresh: int) -> Decoded:
    def along(dim: int, name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts], dim=dim)

    if parts[0].on_fresh is None:
        return Decoded(along(3, "output"), along(3, "lse"), None, None)
    on_fresh = [torch.nn.functional.pad(p.on_fresh, (0, fresh - p.on_fresh.shape[-1])) for p in parts]  # type: ignore[arg-type, union-attr]  # all or none
    return Decoded(along(3, "output"), along(3, "lse"), along(2, "on_kept"), torch.cat(on_fresh, dim=2))
