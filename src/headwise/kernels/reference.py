"""Reference kernels, plain torch with fp32 inside: query rows and a layer's pages -> attention output."""

from __future__ import annotations

import torch
from torch.nn import functional

from headwise.prefill import logits_of, probabilities
from headwise.types import Bool, Float, LogitOptions, PageView, Tensor

NAME = "reference"


def ragged_decode(
    query: Float[Tensor, "b h g q d"],
    pages: PageView,
    fresh_keys: Float[Tensor, "b h f d"],
    fresh_values: Float[Tensor, "b h f e"],
    visible: Bool[Tensor, "b h q n"] | None,
    fresh_visible: Bool[Tensor, "b q f"],
    options: LogitOptions,
) -> tuple[Float[Tensor, "b h g q e"], Float[Tensor, "b h q n"], Float[Tensor, "b h q f"]]:
    """Attention of a few query rows over each KV head's own pages and over the fresh rows, in one softmax.

    Args:
        query: the newest tokens; the q-th is also the q-th last fresh row.
        pages: kept rows; n is the length of the longest head.
        fresh_keys, fresh_values: rows that are not in the pages yet.
        visible: True where a query may see a kept row; None means all of them.
        fresh_visible: True where a query may see a fresh row.

    Returns:
        the output in the values' dtype, and the probability of every kept and every fresh row, summed over the
        group in fp32; 0 for rows beyond a head's length.
    """
    heads = pages.lengths.shape[1]
    # Whole pages are gathered, up to the longest head's last; rows beyond a head's length are hidden below.
    used = -(-pages.longest // pages.keys.shape[1])
    own = pages.table[:, :, :used].long().clamp(min=0)
    keys = pages.keys.index_select(0, own.flatten()).view(*own.shape[:2], -1, pages.keys.shape[-1])
    values = pages.values.index_select(0, own.flatten()).view(*own.shape[:2], -1, pages.values.shape[-1])
    gathered = keys.shape[2]
    occupied = torch.arange(gathered, device=keys.device) < pages.lengths[:, :, None]
    # That memory is undefined. A key's logit is overwritten, but 0 times a value that is NaN would still be NaN.
    values.masked_fill_(~occupied[..., None], 0)
    if visible is not None:
        visible = functional.pad(visible, (0, gathered - pages.longest))

    kept_visible = occupied[:, :, None] if visible is None else occupied[:, :, None] & visible
    queries = query.shape[3]
    sees = torch.cat(
        [
            kept_visible.expand(-1, -1, queries, -1),
            fresh_visible[:, None].expand(-1, heads, -1, -1),
        ],
        dim=-1,
    )
    logits = torch.cat([logits_of(query, keys, options), logits_of(query, fresh_keys, options)], dim=-1)
    weights = probabilities(logits, sees[:, :, None], options)
    output = torch.einsum("bhgqn,bhne->bhgqe", weights[..., :gathered], values.float())
    output = output + torch.einsum("bhgqf,bhfe->bhgqe", weights[..., gathered:], fresh_values.float())
    attention = weights.sum(dim=2)
    return output.to(fresh_values.dtype), attention[..., : pages.longest], attention[..., gathered:]
