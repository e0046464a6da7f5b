"""Attention: queries, keys and values of whole columns -> logits, probabilities and output, as usual.

Torch's fused attention, and plain blocks for what it cannot do (a soft cap, sink logits).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch.nn import functional

from headwise.kernels.interface import AttentionMap, Marks, MassRequest
from headwise.types import Bool, Float, Int, LogitOptions, Tensor

# Logits in flight at a time: in fp32 they take 4 MiB, which bounds the memory and stays near the processor.
_BLOCK_LOGITS = 2**20

# Query rows at a time where fused attention takes a mask on a CPU, which keeps the mask near the processor.
_MASKED_ROWS = 256

# The same where columns have marks, which are numbers; on a CPU, and elsewhere.
_MARKED_ROWS = 64, 512

# What a masked logit is set to: unlike minus infinity it leaves no NaN in a row that sees nothing.
HIDDEN = torch.finfo(torch.float32).min


def query_blocks(query: Float[Tensor, "b h g q d"], keys: int) -> Iterator[slice]:
    """Slices of the query rows, such that one slice's logits over that many keys fit the working memory."""
    batch, heads, group, rows, _ = query.shape
    step = max(1, _BLOCK_LOGITS // max(1, batch * heads * group * keys))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def logits_of(
    query: Float[Tensor, "b h g q d"], keys: Float[Tensor, "b h t d"], options: LogitOptions
) -> Float[Tensor, "b h g q t"]:
    """Logits in fp32, before any mask."""
    logits = torch.einsum("bhgqd,bhtd->bhgqt", query.float(), keys.float()) * options.scaling
    if options.softcap is not None:
        logits = torch.tanh(logits / options.softcap) * options.softcap
    return logits


def add_marks(logits: Float[Tensor, "b h g q t"], gates: Float[Tensor, "b h g q"], marks: Float[Tensor, "b t"]) -> None:
    """Add to logits what their columns have beside."""
    logits += gates[..., None] * marks[:, None, None, None]


def softmax(logits: Float[Tensor, "b h g q t"], options: LogitOptions) -> Float[Tensor, "b h g q t"]:
    """Softmax over the keys and, where the model has one, the sink logit, which then is left out."""
    if options.sinks is None:
        return logits.softmax(dim=-1)
    sink = options.sinks.float()[None, :, :, None, None].expand(*logits.shape[:-1], 1)
    return torch.cat([logits, sink], dim=-1).softmax(dim=-1)[..., :-1]


def probabilities(
    logits: Float[Tensor, "b h g q t"],
    visible: Bool[
        Tensor,
        (
            b  # h 1 q t
        ),
    ],
    options: LogitOptions,
) -> Float[Tensor, "b h g q t"]:
    """Softmax over the visible keys; a row that sees none is 0. Overwrites `logits`."""
    weights = softmax(logits.masked_fill_(~visible, HIDDEN), options)
    return weights.mul_(visible.any(dim=-1, keepdim=True))


def causal(query_columns: Int[Tensor, " q"], keys: int) -> Bool[Tensor, "q t"]:
    """Whether each query sees each key, where both are counted in columns."""
    return torch.arange(keys, device=query_columns.device)[None, :] <= query_columns[:, None]


def dense_attention(map: AttentionMap, values: Float[Tensor, "b h t e"]) -> Float[Tensor, "b h g q e"]:
    """Attention of the newest q tokens over all t."""
    query, keys, mask, options = map.query, map.keys, map.mask, map.options
    if options.softcap is None and options.sinks is None:
        if map.marks is None:
            return _fused_attention(query, keys, values, mask, options.scaling)
        return _marked_attention(map, map.marks, values)
    batch, heads, group, rows, _ = query.shape
    columns = map.own_columns()
    output = torch.empty(batch, heads, group, rows, values.shape[-1], dtype=values.dtype, device=values.device)
    for block in query_blocks(query, keys.shape[2]):
        visible = causal(columns[block], keys.shape[2])[None] if mask is None else mask[:, block]
        visible = visible[:, None, None].expand(batch, 1, 1, -1, -1)
        logits = logits_of(query[:, :, :, block], keys, options)
        if map.marks is not None:
            add_marks(logits, map.marks.gates[..., block], map.marks.columns)
        weights = probabilities(logits, visible, options)
        output[:, :, :, block] = torch.einsum("bhgqt,bhte->bhgqe", weights, values.float()).to(output.dtype)
    return output


def counting(request: MassRequest) -> MassRequest:
    """The same without query rows that do not count, which then are not even multiplied."""
    map, weights = request.map, request.weights
    read = (weights > 0).any(dim=0).nonzero().flatten()
    if len(read) == weights.shape[1]:
        return request
    mask, marks = map.mask, map.marks
    map = replace(
        map,
        query=map.query[:, :, :, read],
        mask=None if mask is None else mask[:, read],
        columns=map.own_columns()[read],
        marks=None if marks is None else replace(marks, gates=marks.gates[..., read]),
    )
    return replace(request, map=map, weights=weights[:, read])


def _marked_attention(map: AttentionMap, marks: Marks, values: Float[Tensor, "b h t e"]) -> Float[Tensor, "b h g q e"]:
    """Torch's fused attention, and once more with the marks for those heads that have a gate.

    Heads without one are computed as though nothing were marked. Of the others the marks and what is visible are made
    for a few query rows of one head at a time: all at once they would take more than the keys.
    """
    query, keys, mask = map.query, map.keys, map.mask
    gated = (marks.gates != 0).any(dim=3).any(dim=0)
    rows, total, columns = query.shape[3], keys.shape[2], map.own_columns()
    # Other devices take no numbers of another type.
    step, dtype = (_MARKED_ROWS[0], torch.float32) if query.device.type == "cpu" else (_MARKED_ROWS[1], query.dtype)
    if bool(gated.all()):
        output = query.new_empty(*query.shape[:4], values.shape[-1])
    else:
        output = _fused_attention(query, keys, values, mask, map.options.scaling)
    for h, g in gated.nonzero().tolist():
        for start in range(0, rows, step):
            block = slice(start, min(start + step, rows))
            # Under causality no row of the block sees further than its last row.
            seen = total if mask is not None else total - rows + block.stop
            visible = causal(columns[block], seen)[None] if mask is None else mask[:, block]
            added = marks.gates[:, h, g, block, None] * marks.columns[:, None, :seen]
            added = added.masked_fill(~visible, -torch.inf).to(dtype)[:, None]
            asked, own = query[:, h, g, None, block], (keys[:, h, None, :seen], values[:, h, None, :seen])
            attended = functional.scaled_dot_product_attention(asked, *own, attn_mask=added, scale=map.options.scaling)
            output[:, h, g, block] = attended[:, 0]
    return output


def _fused_attention(
    query: Float[Tensor, "b h g q d"],
    keys: Float[Tensor, "b h t d"],
    values: Float[Tensor, "b h t e"],
    mask: Bool[Tensor, "b q t"] | None,
    scaling: float,
) -> Float[Tensor, "b h g q e"]:
    group, rows = query.shape[2:4]
    total, flat = keys.shape[2], query.flatten(1, 2)
    attend = functional.scaled_dot_product_attention
    if mask is None and (rows < 2 or rows == total):
        output: Tensor = attend(flat, keys, values, is_causal=rows > 1, scale=scaling, enable_gqa=group > 1)
        return output.view(*query.shape[:4], -1)
    # With a mask, grouped queries leave the fused kernels; copies of the keys do not.
    keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
    columns = torch.arange(total - rows, total, device=keys.device)
    step = _MASKED_ROWS if keys.device.type == "cpu" else rows
    pieces = []
    for start in range(0, rows, step):
        block = slice(start, min(start + step, rows))
        # Under causality no row of the block sees further than its last row.
        seen = total if mask is not None else total - rows + block.stop
        visible = causal(columns[block], seen)[None] if mask is None else mask[:, block]
        pieces.append(
            attend(flat[:, :, block], keys[:, :, :seen], values[:, :, :seen], attn_mask=visible[:, None], scale=scaling)
        )
    return torch.cat(pieces, dim=2).view(*query.shape[:4], -1)
