"""Reference kernels, plain torch with fp32 inside: they define what every other kernel computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from headwise.kernels.attention import HIDDEN, causal, dense_attention, logits_of, probabilities, query_blocks, softmax
from headwise.quant.codes import decode
from headwise.types import Bool, Decoded, Float, Int, LogitOptions, PageView, Tensor, UInt8


def obstacle(device: torch.device) -> str | None:
    """Why these kernels cannot run on that device: they run everywhere."""
    return None


def ragged_decode(
    query: Float[Tensor, "b h g q d"],
    pages: Sequence[PageView],
    fresh_keys: Float[Tensor, "b h f d"],
    fresh_values: Float[Tensor, "b h f e"],
    mask: Bool[Tensor, "b q t"] | None,
    options: LogitOptions,
    *,
    with_mass: bool,
) -> Decoded:
    """Attention of a few query rows over each KV head's own pages and over the fresh rows, in one softmax.

    Args:
        query: the newest tokens; the q-th is also the q-th last fresh row.
        pages: kept rows, the exact ones first; n is the sum of what is `longest` in each.
        fresh_keys, fresh_values: rows that are not in the pages yet.
        mask: True where a query may see a column; its last f columns are the fresh rows. None lets every query see
            all kept rows and the fresh rows up to its own.
        with_mass: whether to return the probabilities; they take q x (n + f) numbers per KV head.
    """
    batch, heads, _, queries, _ = query.shape
    fresh = fresh_keys.shape[2]
    kept = [_gathered(view) for view in pages]
    keys, values, columns, occupied = (torch.cat(parts, dim=2) for parts in zip(*kept, strict=True))
    gathered = keys.shape[2]
    sees = occupied[:, :, None].expand(-1, -1, queries, -1)
    if mask is None:
        rows = torch.arange(fresh - queries, fresh, device=query.device)
        sees_fresh = causal(rows, fresh)[None].expand(batch, -1, -1)
    else:
        sees = sees & _at_columns(mask, columns.long())
        sees_fresh = mask[:, :, mask.shape[-1] - fresh :]
    sees = torch.cat([sees, sees_fresh[:, None].expand(-1, heads, -1, -1)], dim=-1)
    logits = torch.cat([logits_of(query, keys, options), logits_of(query, fresh_keys, options)], dim=-1)
    lse = _log_sum_exp(logits, sees[:, :, None], options)
    weights = probabilities(logits, sees[:, :, None], options)
    output = torch.einsum("bhgqn,bhne->bhgqe", weights[..., :gathered], values.float())
    output = output + torch.einsum("bhgqf,bhfe->bhgqe", weights[..., gathered:], fresh_values.float())
    mass = weights.sum(dim=2) if with_mass else None
    return Decoded(
        output.to(fresh_values.dtype),
        lse,
        None if mass is None else mass[..., :gathered],
        None if mass is None else mass[..., gathered:],
    )


def append(
    pages: PageView,
    keys: Float[Tensor, "b h f d"] | UInt8[Tensor, "b h f kc"],
    values: Float[Tensor, "b h f e"] | UInt8[Tensor, "b h f vc"],
    columns: Int[Tensor, " f"],
    real: Bool[Tensor, "b f"] | None,
    scores: Float[Tensor, "b h f"] | None,
    increments: Float[Tensor, "b h n"] | None,
) -> None:
    """Write rows behind the kept ones of every head, and count them in `pages.lengths`, in place.

    The pages for them must be in the table already. Without `real`, nothing waits for the device.

    Args:
        real: rows to write, the same in every head; None means all of them.
        scores: of the new rows, where the pages carry scores.
        increments: to add to the scores of the rows already there; ignored beyond a head's length.
    """
    batch, heads, fresh, _ = keys.shape
    size = pages.keys.shape[1]
    starts = pages.table.long() * size
    if increments is not None:
        assert pages.scores is not None
        rows = torch.arange(increments.shape[-1], device=keys.device)
        held = rows < pages.lengths[:, :, None]
        # A row beyond a head's length has no address: nothing is added to the first one instead.
        at = (starts[:, :, rows // size] + rows % size).where(held, 0)
        pages.scores.view(-1).index_add_(0, at.flatten(), increments.where(held, 0).flatten())
    written = torch.ones(batch, fresh, dtype=torch.bool, device=keys.device) if real is None else real
    place = pages.lengths[:, :, None] + (written.cumsum(dim=1) - 1)[:, None]
    at = starts.gather(2, (place // size).clamp(0, starts.shape[-1] - 1)) + place % size
    chosen = slice(None) if real is None else real[:, None].expand_as(at).flatten()
    contents = (keys, values, columns.expand(batch, heads, -1), scores)
    for pool, content in zip((pages.keys, pages.values, pages.columns, pages.scores), contents, strict=True):
        if pool is not None:
            assert content is not None
            rows = content.flatten(0, 2)[chosen].to(pool.dtype)
            pool.flatten(0, 1).index_copy_(0, at.flatten()[chosen], rows)
    pages.lengths.add_(written.sum(dim=1)[:, None])


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
    """Weighted column sums of the attention map, in blocks of rows: memory grows with t, not with t x t.

    Args:
        columns: each query row's own column, ascending.
        mask: True where a query may see a key; None means causal.
        weights: how much each query row counts.
        positions: of every column, never falling; a key is in the band where the query is less than the width
            ahead of it.
        widths: of the bands, for every sequence.

    Returns:
        the mass on every column, and the part of it inside each band, in fp32.
    """
    batch, heads, group, _, _ = query.shape
    total = keys.shape[2]
    mass = torch.zeros(batch, heads, group, total, device=keys.device)
    band = mass.new_zeros(len(widths), *mass.shape)
    for block, attention in _map_blocks(query, keys, columns, mask, options):
        own, seen = columns[block], attention.shape[-1]
        first, last = int(own[0]), int(own[-1])
        received = _weighted(attention, weights[:, block])
        mass[..., :seen] += received
        for sums, width in zip(band, widths, strict=True):
            # From `inner` on, a column is in the band of every row of the block; before `outer`, of none.
            inner = _first_within(positions, last, width, seen, every=True)
            outer = _first_within(positions, first, width, seen, every=False)
            sums[..., inner:seen] += received[..., inner:]
            distance = positions[:, own, None] - positions[:, None, outer:inner]
            inside = (distance < width[:, None, None])[:, None, None]
            sums[..., outer:inner] += _weighted(attention[..., outer:inner] * inside, weights[:, block])
    return mass, band


def attention_and_peaks(
    query: Float[Tensor, "b h g q d"],
    keys: Float[Tensor, "b h t d"],
    values: Float[Tensor, "b h t e"],
    mask: Bool[Tensor, "b q t"] | None,
    options: LogitOptions,
    counted: Sequence[slice],
) -> tuple[Float[Tensor, "b h g q e"], Float[Tensor, "b h t"]]:
    """Attention of the newest q columns over all t, and the most that any row of a group would give each column.

    Args:
        mask: True where a query may see a key; None means causal.
        counted: ranges of columns, ascending; a second softmax is over these alone.

    Returns:
        the output, and the largest probability of each column in the second softmax, in fp32; 0 outside of it.
    """
    return attend_and_gather(query, keys, values, mask, options, counted, column_max)


def attend_and_gather(
    query: Float[Tensor, "b h g q d"],
    keys: Float[Tensor, "b h t d"],
    values: Float[Tensor, "b h t e"],
    mask: Bool[Tensor, "b q t"] | None,
    options: LogitOptions,
    counted: Sequence[slice],
    largest: Callable[..., Tensor],
) -> tuple[Float[Tensor, "b h g q e"], Float[Tensor, "b h t"]]:
    """`attention_and_peaks` in two passes, by a function with the signature of `column_max`."""
    total = keys.shape[2]
    everything = torch.arange(total, device=keys.device)
    chosen = torch.cat([everything[part] for part in counted])
    # How far each row sees among the chosen keys.
    columns = torch.searchsorted(chosen, everything[total - query.shape[3] :], right=True) - 1
    found = largest(query, keys[:, :, chosen], columns, None if mask is None else mask[..., chosen], options)
    peaks = found.new_zeros(*found.shape[:2], total).index_copy_(2, chosen, found)
    return dense_attention(query, keys, values, mask, options), peaks


def column_max(
    query: Float[Tensor, "b h g q d"],
    keys: Float[Tensor, "b h t d"],
    columns: Int[Tensor, " q"],
    mask: Bool[Tensor, "b q t"] | None,
    options: LogitOptions,
) -> Float[Tensor, "b h t"]:
    """Largest number in each column of the attention maps of a group; 0 where no row sees it.

    Args:
        columns: each query row's own column, ascending.
        mask: True where a query may see a key; None means causal.
    """
    best = torch.zeros(*keys.shape[:3], device=keys.device)
    for _, attention in _map_blocks(query, keys, columns, mask, options):
        seen = best[..., : attention.shape[-1]]
        torch.maximum(seen, attention.amax(dim=(2, 3)), out=seen)
    return best


def _map_blocks(
    query: Float[Tensor, "b h g q d"],
    keys: Float[Tensor, "b h t d"],
    columns: Int[Tensor, " q"],
    mask: Bool[Tensor, "b q t"] | None,
    options: LogitOptions,
) -> Iterator[tuple[slice, Float[Tensor, "b h g rows seen"]]]:
    """The attention map, some rows at a time; columns that none of them sees are left out at the end."""
    total = keys.shape[2]
    for block in query_blocks(query, total):
        own = columns[block]
        first, last = int(own[0]), int(own[-1])
        # Under causality no row of the block sees further than its last row, and all see up to the first.
        seen = total if mask is not None else last + 1
        logits = logits_of(query[:, :, :, block], keys[:, :, :seen], options)
        if mask is None:
            logits[..., first:].masked_fill_(~causal(own, seen)[:, first:], HIDDEN)
            yield block, softmax(logits, options)
        else:
            yield block, probabilities(logits, mask[:, None, None, block], options)


def _gathered(view: PageView) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of every head side by side: keys and values as numbers, columns, and where there is a row.

    Pages hold undefined memory beyond a head's length. A key's logit there is overwritten, but 0 times a value that is
    NaN would still be NaN: values and columns are 0 there.
    """
    size, (batch, heads) = view.columns.shape[1], view.lengths.shape
    own = view.table[:, :, : -(-view.longest // size)].long().clamp(min=0).flatten()

    def rows(pool: Tensor) -> Tensor:
        return pool.index_select(0, own).view(batch, heads, -1, *pool.shape[2:])[:, :, : view.longest]

    keys, values, columns = rows(view.keys), rows(view.values), rows(view.columns)
    occupied = torch.arange(view.longest, device=keys.device) < view.lengths[:, :, None]
    if view.packing is not None:
        packing = view.packing
        keys = decode(keys, rows(packing.key_steps), packing.key_bits) @ packing.key_rotation.T
        values = decode(values, rows(packing.value_steps), packing.value_bits) @ packing.value_rotation.T
    return keys, values.masked_fill(~occupied[..., None], 0), columns.masked_fill(~occupied, 0), occupied


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
