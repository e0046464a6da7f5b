"""Reference kernels, plain torch with fp32 inside: they define what every other kernel computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from headwise.kernels.attention import (
    HIDDEN,
    add_marks,
    causal,
    counting,
    dense_attention,
    logits_of,
    probabilities,
    query_blocks,
    softmax,
)
from headwise.kernels.interface import (
    AppendRequest,
    AttentionMap,
    Decoded,
    DecodeRequest,
    Kernels,
    Marks,
    MassRequest,
    PageView,
    PeaksRequest,
)
from headwise.quant.codes import decode
from headwise.types import Bool, Float, Int, LogitOptions, Tensor


def obstacle(device: torch.device) -> str | None:
    """Why these kernels cannot run on that device: they run everywhere."""
    return None


def ragged_decode(request: DecodeRequest) -> Decoded:
    """Attention of a few query rows over each KV head's own pages and over the fresh rows, in one softmax."""
    query, mask, options = request.query, request.mask, request.options
    batch, heads, _, queries, _ = query.shape
    fresh = request.fresh_keys.shape[2]
    kept = [_gathered(view) for view in request.pages]
    keys, values, columns, occupied, biases = (torch.cat(parts, dim=2) for parts in zip(*kept, strict=True))
    gathered = keys.shape[2]
    sees = occupied[:, :, None].expand(-1, -1, queries, -1)
    if mask is None:
        rows = torch.arange(fresh - queries, fresh, device=query.device)
        sees_fresh = causal(rows, fresh)[None].expand(batch, -1, -1)
    else:
        sees = sees & _at_columns(mask, columns.long())
        sees_fresh = mask[:, :, mask.shape[-1] - fresh :]
    sees = torch.cat([sees, sees_fresh[:, None].expand(-1, heads, -1, -1)], dim=-1)
    on_kept = logits_of(query, keys, options) + biases[:, :, None, None]
    on_fresh = logits_of(query, request.fresh_keys, options)
    if request.marks is not None:
        on_kept += request.marks.gates[..., None] * _marks_of(request.marks, columns.long())[:, :, None, None]
        if request.marks.fresh is not None:
            add_marks(on_fresh, request.marks.gates, request.marks.fresh)
    logits = torch.cat([on_kept, on_fresh], dim=-1)
    lse = _log_sum_exp(logits, sees[:, :, None], options)
    weights = probabilities(logits, sees[:, :, None], options)
    output = torch.einsum("bhgqn,bhne->bhgqe", weights[..., :gathered], values.float())
    output = output + torch.einsum("bhgqf,bhfe->bhgqe", weights[..., gathered:], request.fresh_values.float())
    mass = weights.sum(dim=2) if request.with_mass else None
    return Decoded(
        output.to(request.fresh_values.dtype),
        lse,
        None if mass is None else mass[..., :gathered],
        None if mass is None else mass[..., gathered:],
    )


def append(request: AppendRequest) -> None:
    """Write rows behind the kept exact ones of every head, and count them in `lengths`, in place."""
    for view, increments in zip(request.pages, request.increments_by_view(), strict=True):
        if increments is not None:
            _add_scores(view, increments)
    pages, real, keys = request.pages[0], request.real, request.keys
    batch, heads, fresh, _ = keys.shape
    written = torch.ones(batch, fresh, dtype=torch.bool, device=keys.device) if real is None else real
    place = pages.lengths[:, :, None] + (written.cumsum(dim=1) - 1)[:, None]
    page = pages.table.long().gather(2, (place // pages.page_size).clamp(0, pages.table.shape[-1] - 1))
    chosen = slice(None) if real is None else real[:, None].expand_as(page).flatten()
    at = page.flatten()[chosen], (place % pages.page_size).flatten()[chosen]
    if pages.biases is not None:
        pages.biases.index_put_(at, pages.biases.new_zeros(()))
    contents = (keys, request.values, request.columns.expand(batch, heads, -1), request.scores)
    for pool, content in zip((pages.keys, pages.values, pages.columns, pages.scores), contents, strict=True):
        if pool is not None:
            assert content is not None
            pool.index_put_(at, content.flatten(0, 2)[chosen].to(pool.dtype))
    pages.lengths.add_(written.sum(dim=1)[:, None])


def column_mass(request: MassRequest) -> tuple[Float[Tensor, "b h g t"], Float[Tensor, "w b h g t"]]:
    """Weighted column sums of the attention map, in blocks of rows: memory grows with t, not with t x t.

    Returns:
        the mass on every column, and the part of it inside each band, in fp32.
    """
    map, weights, positions, columns = request.map, request.weights, request.positions, request.map.own_columns()
    batch, heads, group, _, _ = map.query.shape
    total = map.keys.shape[2]
    mass = torch.zeros(batch, heads, group, total, dtype=torch.float32, device=map.keys.device)
    band = mass.new_zeros(len(request.widths), *mass.shape)
    for block, attention in _map_blocks(map):
        own, seen = columns[block], attention.shape[-1]
        first, last = int(own[0]), int(own[-1])
        received = _weighted(attention, weights[:, block])
        mass[..., :seen] += received
        for sums, width in zip(band, request.widths, strict=True):
            # From `inner` on, a column is in the band of every row of the block; before `outer`, of none.
            inner = _first_within(positions, last, width, seen, every=True)
            outer = _first_within(positions, first, width, seen, every=False)
            sums[..., inner:seen] += received[..., inner:]
            distance = positions[:, own, None] - positions[:, None, outer:inner]
            inside = (distance < width[:, None, None])[:, None, None]
            sums[..., outer:inner] += _weighted(attention[..., outer:inner] * inside, weights[:, block])
    return mass, band


def attention_and_mass(request: MassRequest, values: Float[Tensor, "b h t e"]) -> tuple[Tensor, Tensor, Tensor]:
    """Attention over all columns, and what `column_mass` gives of the same map."""
    return dense_attention(request.map, values), *column_mass(counting(request))


def attention_and_peaks(request: PeaksRequest) -> tuple[Float[Tensor, "b h g q e"], Float[Tensor, "b h t"]]:
    """Attention of the newest q columns over all t, and the most that any row of a group would give each column.

    Returns:
        the output, and the largest probability of each column in the second softmax, in fp32; 0 outside of it.
    """
    return attend_and_gather(request, column_max)


def attend_and_gather(
    request: PeaksRequest, largest: Callable[[AttentionMap], Tensor]
) -> tuple[Float[Tensor, "b h g q e"], Float[Tensor, "b h t"]]:
    """`attention_and_peaks` in two passes, by a function with the signature of `column_max`."""
    map = request.map
    total = map.keys.shape[2]
    everything = torch.arange(total, device=map.keys.device)
    chosen = torch.cat([everything[part] for part in request.counted])
    # How far each row sees among the chosen keys.
    columns = torch.searchsorted(chosen, map.own_columns(), right=True) - 1
    mask, marks = None if map.mask is None else map.mask[..., chosen], map.marks
    if marks is not None:
        marks = replace(marks, columns=marks.columns[:, chosen])
    found = largest(AttentionMap(map.query, map.keys[:, :, chosen], mask, map.options, columns, marks))
    peaks = found.new_zeros(*found.shape[:2], total).index_copy_(2, chosen, found)
    return dense_attention(map, request.values), peaks


def column_max(map: AttentionMap) -> Float[Tensor, "b h t"]:
    """Largest number in each column of the attention maps of a group; 0 where no row sees it."""
    best = torch.zeros(*map.keys.shape[:3], dtype=torch.float32, device=map.keys.device)
    for _, attention in _map_blocks(map):
        seen = best[..., : attention.shape[-1]]
        torch.maximum(seen, attention.amax(dim=(2, 3)), out=seen)
    return best


def _map_blocks(map: AttentionMap) -> Iterator[tuple[slice, Float[Tensor, "b h g rows seen"]]]:
    """The attention map, some rows at a time; columns that none of them sees are left out at the end."""
    total, columns = map.keys.shape[2], map.own_columns()
    for block in query_blocks(map.query, total):
        own = columns[block]
        first, last = int(own[0]), int(own[-1])
        # Under causality no row of the block sees further than its last row, and all see up to the first.
        seen = total if map.mask is not None else last + 1
        logits = logits_of(map.query[:, :, :, block], map.keys[:, :, :seen], map.options)
        if map.marks is not None:
            add_marks(logits, map.marks.gates[..., block], map.marks.columns[:, :seen])
        if map.mask is None:
            logits[..., first:].masked_fill_(~causal(own, seen)[:, first:], HIDDEN)
            yield block, softmax(logits, map.options)
        else:
            yield block, probabilities(logits, map.mask[:, None, None, block], map.options)


def _add_scores(pages: PageView, increments: Float[Tensor, "b h n"]) -> None:
    assert pages.scores is not None
    rows = torch.arange(increments.shape[-1], device=increments.device)
    held = rows < pages.lengths[:, :, None]
    # A row beyond a head's length has no address: nothing is added to the first one instead.
    at = pages.table.long()[:, :, rows // pages.page_size] * pages.page_size + rows % pages.page_size
    at = at.where(held, 0)
    pages.scores.view(-1).index_add_(0, at.flatten(), increments.where(held, 0).flatten())


def _gathered(view: PageView) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows of every head side by side: keys and values as numbers, columns, where there is a row, and biases.

    Pages hold undefined memory beyond a head's length. A key's logit there is overwritten, but 0 times a value that is
    NaN would still be NaN: values, columns and biases are 0 there.
    """
    size, (batch, heads) = view.page_size, view.lengths.shape
    own = view.table[:, :, : -(-view.longest // size)].long().clamp(min=0)

    def rows(pool: Tensor) -> Tensor:
        found = pool.index_select(0, own.flatten())
        return found.reshape(batch, heads, own.shape[-1] * size, *pool.shape[2:])[:, :, : view.longest]

    keys, values = rows(view.keys), rows(view.values)
    occupied = torch.arange(view.longest, device=keys.device) < view.lengths[:, :, None]
    columns = torch.zeros_like(occupied, dtype=torch.int32) if view.columns is None else rows(view.columns)
    if view.coding is not None:
        coding = view.coding
        keys = decode(keys, rows(coding.key_steps), coding.key_bits) @ coding.key_hadamard.T
        values = decode(values, rows(coding.value_steps), coding.value_bits) @ coding.value_hadamard.T
    biases = torch.zeros_like(occupied, dtype=torch.float32) if view.biases is None else rows(view.biases).float()
    values, columns = values.masked_fill(~occupied[..., None], 0), columns.masked_fill(~occupied, 0)
    return keys, values, columns, occupied, biases.masked_fill(~occupied, 0)


def _marks_of(marks: Marks, columns: Int[Tensor, "b h n"]) -> Float[Tensor, "b h n"]:
    """The marks of the columns that each head kept."""
    count, (batch, heads, rows) = marks.columns.shape[1], columns.shape
    if not count:
        return torch.zeros_like(columns, dtype=torch.float32)
    found = marks.columns.gather(1, columns.clamp(max=count - 1).reshape(batch, heads * rows))
    return found.view(columns.shape).masked_fill(columns >= count, 0)


def _at_columns(mask: Bool[Tensor, "b q t"], columns: Int[Tensor, "b h n"]) -> Bool[Tensor, "b h q n"]:
    """The mask's entries at the columns that each head kept."""
    batch, heads, rows = columns.shape
    index = columns.reshape(batch, 1, heads * rows).expand(-1, mask.shape[1], -1)
    return mask.gather(2, index).view(batch, mask.shape[1], heads, rows).transpose(1, 2)


def _log_sum_exp(
    logits: Float[Tensor, "b h g q n"], sees: Bool[Tensor, "b h 1 q n"], options: LogitOptions
) -> Float[Tensor, "b h g q"]:
    seen = logits.masked_fill(~sees, -torch.inf)
    lse = seen.logsumexp(dim=-1)
    return lse if options.sinks is None else torch.logaddexp(lse, options.sinks.float()[None, :, :, None])


def _weighted(attention: Float[Tensor, "b h g q t"], weights: Float[Tensor, "b q"]) -> Float[Tensor, "b h g t"]:
    return (weights[:, None, None, None] @ attention).squeeze(-2)


def _first_within(positions: Int[Tensor, "b t"], row: int, width: Int[Tensor, " b"], seen: int, *, every: bool) -> int:
    """First column less than a width behind the row, in every sequence or in any; `seen` where there is none."""
    near = positions[:, row, None] - positions[:, :seen] < width[:, None]
    near = near.all(dim=0) if every else near.any(dim=0)
    return int(near.int().argmax()) if bool(near.any()) else seen


KERNELS = Kernels(
    "reference", obstacle, ragged_decode, append, dense_attention, attention_and_mass, column_mass, attention_and_peaks
)
