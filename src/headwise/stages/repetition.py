"""Repetition: queries that repeat a part of the prompt -> the largest attention that each of its tokens gets.

Beside their own attention (KVzip, arXiv 2505.23416, section 3.2).
"""

from __future__ import annotations

from dataclasses import replace

from headwise.kernels.interface import AttentionMap, Kernels, PeaksRequest
from headwise.types import Float, Tensor

# First columns that take part in the softmax whatever is repeated: models park attention there.
_SINKS = 4


def attend_repetition(
    map: AttentionMap, values: Float[Tensor, "b h t e"], chunk: slice, kernels: Kernels
) -> tuple[Float[Tensor, "b h g q e"], Float[Tensor, "b h c"]]:
    """Attention as usual, and the largest over all queries of a group.

    That one's softmax is over the chunk, the first columns and the queries' own.

    Args:
        map: of the q tokens that repeat, whose own columns are behind those of the prompt.
        chunk: columns of the prompt that are repeated, c of them.
    """
    total = map.keys.shape[2]
    first = total - map.query.shape[3]
    if map.mask is not None:
        # A query that does not see itself is padding, and what it looks at does not count.
        map = replace(map, mask=map.mask & map.mask.diagonal(first, -2, -1)[..., None])
    counted = [slice(0, min(_SINKS, chunk.start)), chunk, slice(first, total)]
    output, peaks = kernels.attention_and_peaks(PeaksRequest(map, values, _joined(counted)))
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
