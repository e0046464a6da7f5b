"""Reconstruct: queries that repeat a part of the prompt -> the largest attention that each of its tokens gets.

Beside their own attention (KVzip, arXiv 2505.23416, section 3.2).
"""

from __future__ import annotations

from headwise.kernels import Kernels
from headwise.types import Bool, Float, LogitOptions, Tensor

# First columns that take part in the softmax whatever is repeated: models park attention there.
_SINKS = 4


def attend_repeating(
    query: Float[Tensor, "b h g q d"],
    keys: Float[Tensor, "b h t d"],
    values: Float[Tensor, "b h t e"],
    mask: Bool[Tensor, "b q t"] | None,
    options: LogitOptions,
    chunk: slice,
    kernels: Kernels,
) -> tuple[Float[Tensor, "b h g q e"], Float[Tensor, "b h c"]]:
    """Attention as usual, and the largest over all queries of a group.

    That one's softmax is over the chunk, the first columns and the queries' own.

    Args:
        keys, values: of the prompt, and behind it of the q tokens.
        mask: True where a query may see a column; None means causal.
        chunk: columns of the prompt that are repeated, c of them.
    """
    total = keys.shape[2]
    first = total - query.shape[3]
    if mask is not None:
        # A query that does not see itself is padding, and what it looks at does not count.
        mask = mask & mask.diagonal(first, -2, -1)[..., None]
    counted = [slice(0, min(_SINKS, chunk.start)), chunk, slice(first, total)]
    output, peaks = kernels.attention_and_peaks(query, keys, values, mask, options, _joined(counted))
    return output, peaks[..., chunk]


def _joined(ranges: list[slice]) -> list[slice]:
    """The same columns without empty ranges, and with one range where one begins as another ends."""
    joined: list[slice] = []
    for part in ranges:
        if joined and joined[-1].stop == part.start:
            part = slice(joined.pop().start, part.stop)
        if part.start < part.stop:
            joined.append(part)
    return joined
