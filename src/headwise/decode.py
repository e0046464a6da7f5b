"""5/7 decode: queries of new tokens over each head's kept rows -> attention output and the mass on every row."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from headwise.kernels import reference
from headwise.prefill import causal, query_blocks
from headwise.store import PagedStore
from headwise.types import Bool, Float, LogitOptions, Tensor

# Every kernel that can be asked for by name. One for now; each is tested against the reference.
KERNELS = {reference.NAME: reference.ragged_decode}


@dataclass
class Attention:
    """What came of the attention of q new tokens.

    Attributes:
        output: of every query head.
        on_kept: probability of every kept row, summed over the group; None where no rule ranks by it.
        on_fresh: the same for the fresh rows.
    """

    output: Float[Tensor, "b h g q e"]
    on_kept: Float[Tensor, "b h q n"] | None
    on_fresh: Float[Tensor, "b h q f"] | None


def decode(
    query: Float[Tensor, "b h g q d"],
    store: PagedStore,
    fresh_keys: Float[Tensor, "b h f d"],
    fresh_values: Float[Tensor, "b h f e"],
    mask: Bool[Tensor, "b q t"] | None,
    options: LogitOptions,
    *,
    with_mass: bool,
    kernel: str = reference.NAME,
) -> Attention:
    """Attend with the newest q tokens over the store and over the fresh rows, whose last q are their own.

    Args:
        mask: True where a query may see a column; its last f columns are the fresh ones. None means causal.
        with_mass: whether to return the probabilities; they take q x (n + f) numbers per KV head.
    """
    run = KERNELS[kernel]
    batch, _, _, queries, _ = query.shape
    fresh = fresh_keys.shape[2]
    own = torch.arange(fresh - queries, fresh, device=query.device)
    outputs, on_kept, on_fresh = [], [], []
    columns = store.kept_columns().long() if mask is not None else None
    if columns is not None:
        columns = columns.masked_fill(~store.occupied(), 0)
    for block in query_blocks(query, store.longest + fresh):
        if mask is None or columns is None:
            visible, fresh_visible = None, causal(own[block], fresh)[None].expand(batch, -1, -1)
        else:
            visible = _at_columns(mask[:, block], columns)
            fresh_visible = mask[:, block, mask.shape[-1] - fresh :]
        output, kept_mass, fresh_mass = run(
            query[:, :, :, block], store.view(), fresh_keys, fresh_values, visible, fresh_visible, options
        )
        outputs.append(output)
        if with_mass:
            on_kept.append(kept_mass)
            on_fresh.append(fresh_mass)
    return Attention(
        torch.cat(outputs, dim=3),
        torch.cat(on_kept, dim=2) if with_mass else None,
        torch.cat(on_fresh, dim=2) if with_mass else None,
    )


def _at_columns(mask: Bool[Tensor, "b q t"], columns: Tensor) -> Bool[Tensor, "b h q n"]:
    """The mask's entries at the columns that each head kept."""
    batch, heads, rows = columns.shape
    index = columns.reshape(batch, 1, heads * rows).expand(-1, mask.shape[1], -1)
    return mask.gather(2, index).view(batch, mask.shape[1], heads, rows).transpose(1, 2)
