"""Repetition: queries that repeat a part of what was read -> the largest attention that each of its tokens gets.

Beside their own attention (KVzip, arXiv 2505.23416, section 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import torch
from torch.nn import functional

from headwise.kernels.interface import AttentionMap, Kernels, Marks, PeaksRequest
from headwise.store.rows import Rows
from headwise.types import Bool, Float, Int, Tensor

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


@dataclass(frozen=True)
class RowFacts:
    """What is known of rows beside what they hold.

    Attributes:
        gates, marks: what is added to their logits where attention is steered, as in `Evidence`.
    """

    positions: Int[Tensor, "b h n"]
    gates: Float[Tensor, "h g"] | None = None
    marks: Float[Tensor, "b h n"] | None = None


def attend_repetition_over_rows(
    map: AttentionMap,
    values: Float[Tensor, "b h q e"],
    held: Rows,
    facts: RowFacts,
    chunk: slice,
    kernels: Kernels,
) -> tuple[Float[Tensor, "b h g q e"], Float[Tensor, "b h n"]]:
    """The same where rows of what was read lie in a store, and columns before the chunk may be gone.

    Args:
        map: of the q tokens that repeat, over their own keys.
        held: the rows, whose biases, where there are any, a soft cap is put on with the logits.
        facts: of the rows.

    Returns:
        the output, and of every row the largest attention; 0 for those outside of the chunk.
    """
    positions = facts.positions
    found = torch.zeros_like(positions, dtype=torch.float32)
    output = map.query.new_empty(*map.query.shape[:4], values.shape[-1])
    chunked = held.keep & (held.columns >= chunk.start) & (held.columns < chunk.stop)
    first = held.keep & ~chunked & (positions < _SINKS)
    for b, h in product(range(len(positions)), range(positions.shape[1])):
        named = (held.keep & ~chunked & ~first)[b, h], first[b, h], chunked[b, h]
        rest, sinks, asked = (rows.nonzero().flatten() for rows in named)
        # Behind one another, so that what counts is one range.
        order = torch.cat([rest, sinks, asked])
        request = PeaksRequest(
            _over(map, held, facts, order, b, h),
            torch.cat([held.values[b, h, order].to(values.dtype), values[b, h]])[None, None],
            [slice(len(rest), len(order) + values.shape[2])],
        )
        own, peaks = kernels.attention_and_peaks(request)
        output[b, h] = own[0, 0]
        found[b, h, asked] = peaks[0, 0, len(order) - len(asked) : len(order)]
    return output, found


def _over(map: AttentionMap, held: Rows, facts: RowFacts, order: Int[Tensor, " k"], b: int, h: int) -> AttentionMap:
    """The map of one head, over those rows of the store and the queries' own."""
    query, own, options = map.query[b, h], map.keys[b, h], map.options
    keys = held.keys[b, h, order].to(own.dtype)
    if held.biases is not None:
        # One channel more, in which every query has a 1 and a key its bias.
        bias = (held.biases[b, h, order].float() / options.scaling).to(keys.dtype)
        query, own = functional.pad(query, (0, 1), value=1.0), functional.pad(own, (0, 1))
        keys = torch.cat([keys, bias[:, None]], dim=-1)
    mask: Bool[Tensor, "1 q all"] | None = None
    if map.mask is not None:
        # A query that does not see itself is padding, and what it looks at does not count.
        visible = map.mask[b] & map.mask[b].diagonal(0, -2, -1)[:, None]
        mask = torch.cat([visible.diagonal(0, -2, -1)[:, None].expand(-1, len(order)), visible], dim=1)[None]
    sinks = None if options.sinks is None else options.sinks[h : h + 1]
    everything = torch.cat([keys, own])[None, None]
    marks = None
    if facts.gates is not None and facts.marks is not None:
        gates = facts.gates[None, h : h + 1, :, None].expand(-1, -1, -1, query.shape[1])
        marks = Marks(gates, functional.pad(facts.marks[b, h, order], (0, len(own)))[None])
    return AttentionMap(query[None, None], everything, mask, replace(options, sinks=sinks), marks=marks)


def _joined(ranges: list[slice]) -> list[slice]:
    """The same columns without empty ranges, and with one range where one begins as another ends."""
    joined: list[slice] = []
    for part in ranges:
        if joined and joined[-1].stop == part.start:
            part = slice(joined.pop().start, part.stop)
        if part.start < part.stop:
            joined.append(part)
    return joined
