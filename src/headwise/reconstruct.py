"""Reconstruct: queries that repeat a part of the prompt -> the largest attention that each of its tokens gets.

Blockwise, like the profile (KVzip, arXiv 2505.23416, section 3.2).
"""

from __future__ import annotations

import torch

from headwise.prefill import causal, logits_of, probabilities, query_blocks
from headwise.types import Bool, Float, LogitOptions, Tensor

# First columns that take part in the softmax whatever is repeated: models park attention there.
_SINKS = 4


def largest_attention(
    query: Float[Tensor, "b h g q d"],
    prompt_keys: Float[Tensor, "b h t d"],
    own_keys: Float[Tensor, "b h q d"],
    mask: Bool[Tensor, "b q all"] | None,
    options: LogitOptions,
    chunk: slice,
) -> Float[Tensor, "b h c"]:
    """Over all queries of a group; the softmax is over the chunk, the first columns and the queries' own keys.

    Args:
        mask: True where a query may see a column of the prompt or one of its own; None means causal.
        chunk: columns of the prompt that are repeated, c of them.
    """
    total, rows = prompt_keys.shape[2], query.shape[3]
    sinks = slice(0, min(_SINKS, chunk.start))
    keys = torch.cat([prompt_keys[:, :, sinks], prompt_keys[:, :, chunk], own_keys], dim=2)
    first, length = sinks.stop, chunk.stop - chunk.start
    best = torch.zeros(*keys.shape[:2], length, device=keys.device)
    for block in query_blocks(query, keys.shape[2]):
        if mask is None:
            columns = torch.arange(block.start, block.stop, device=keys.device) + first + length
            visible = causal(columns, keys.shape[2])[None]
        else:
            seen = mask[:, block]
            own = seen[..., total : total + rows]
            # A query that does not see itself is padding, and what it looks at does not count.
            real = own.diagonal(block.start, -2, -1)[..., None]
            visible = torch.cat([seen[..., sinks], seen[..., chunk], own], dim=-1) & real
        visible = visible[:, None, None].expand(len(keys), -1, -1, -1, -1)
        weights = probabilities(logits_of(query[:, :, :, block], keys, options), visible, options)
        best = best.maximum(weights[..., first : first + length].amax(dim=(2, 3)))
    return best
