"""2/7 profile: queries and keys of the prompt -> the attention mass each head puts on each token.

Blockwise, in fp32, in memory that grows with t and not with t × t. Retained mass of any rule follows from two
column sums per query head, in total and inside the local band (FastGen, section 4.1; specification 9.1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from headwise.policies.base import Policy
from headwise.policies.size import quota_tokens
from headwise.prefill import HIDDEN, causal, logits_of, query_blocks, softmax
from headwise.types import Bool, Float, Int, LogitOptions, Tensor


@dataclass
class Profile:
    """Weighted column sums of the attention map of one layer; profiles of two chunks of queries can be added.

    Attributes:
        score: mass each key received from all query rows, summed over the group; what heavy hitters rank by.
        mass: mass each key received from the rows that the recovery test looks at, per query head.
        band: the same inside the local band, for every window width asked for.
        rows: total weight of the rows that the recovery test looks at.
    """

    score: Float[Tensor, "b h t"]
    mass: Float[Tensor, "b h g t"]
    band: list[Float[Tensor, "b h g t"]]
    rows: Float[Tensor, " b"]

    def __add__(self, later: Profile) -> Profile:
        longer = later.score.shape[-1] - self.score.shape[-1]

        def grown(sums: Tensor) -> Tensor:
            return functional.pad(sums, (0, longer))

        return Profile(
            grown(self.score) + later.score,
            grown(self.mass) + later.mass,
            [grown(mine) + its for mine, its in zip(self.band, later.band, strict=True)],
            self.rows + later.rows,
        )


@dataclass(frozen=True)
class RowWeights:
    """How much each query row counts: in the scores that rank tokens, and in the recovery test."""

    score: Float[Tensor, "b q"]
    recovery: Float[Tensor, "b q"]


def row_weights(
    policy: Policy,
    positions: Int[Tensor, "b q"],
    real: Bool[Tensor, "b q"],
    prompt: Int[Tensor, " b"],
) -> RowWeights:
    """Weights of the query rows at those positions of a prompt of that many tokens.

    All rows count 1. A profile of m of n rows reads evenly spaced ones, the last included, and each counts n / m.
    """
    length = prompt.clamp(min=1)[:, None]
    rows = quota_tokens(policy.profile_rows, length).clamp(min=1).minimum(length)
    sampled = (positions + 1) * rows // length > positions * rows // length
    score = (sampled & real) * (length / rows).float()
    selection = policy.selection
    if selection is None or selection.last_rows is None:
        return RowWeights(score, score)
    last = (positions >= prompt[:, None] - selection.last_rows) & real
    return RowWeights(score, last.float())


def profile(
    query: Float[Tensor, "b h g q d"],
    keys: Float[Tensor, "b h t d"],
    mask: Bool[Tensor, "b q t"] | None,
    options: LogitOptions,
    weights: RowWeights,
    positions: Int[Tensor, "b t"],
    widths: list[Int[Tensor, " b"]],
) -> Profile:
    """Sum the attention of the newest q columns over all t, in total and inside each band.

    Args:
        mask: True where a query may see a key; None means causal.
        positions: of every column; the band of width w is where the query is less than w positions ahead.
        widths: one window width per sequence, for every distinct window of the policy.
    """
    batch, heads, group, rows, _ = query.shape
    columns = keys.shape[2]
    apart = weights.recovery is not weights.score
    score = torch.zeros(batch, heads, columns, device=keys.device)
    mass = torch.zeros(batch, heads, group, columns, device=keys.device)
    band = [torch.zeros_like(mass) for _ in widths]

    read = ((weights.score > 0) | (weights.recovery > 0)).any(dim=0).nonzero().flatten()
    everything = len(read) == rows
    query = query if everything else query[:, :, :, read]
    for block in query_blocks(query, columns):
        at = read[block]
        own = at + columns - rows
        first, last = int(own[0]), int(own[-1])
        # Under causality no row of the block sees further than its last row, and all see up to the first.
        seen = columns if mask is not None else last + 1
        logits = logits_of(query[:, :, :, block], keys[:, :, :seen], options)
        if mask is None:
            logits[..., first:].masked_fill_(~causal(own, seen)[:, first:], HIDDEN)
        else:
            logits.masked_fill_(~mask[:, None, None, at], HIDDEN)
        attention = softmax(logits, options)
        received = _weighted(attention, weights.recovery[:, at])
        mass[..., :seen] += received
        if apart:
            score[..., :seen] += _weighted(attention, weights.score[:, at]).sum(dim=2)
        for sums, width in zip(band, widths, strict=True):
            # From `inner` on, a column is in the band of every row of the block; before `outer`, of none.
            inner = _first_within(positions, last, width, seen, every=True)
            outer = _first_within(positions, first, width, seen, every=False)
            sums[..., inner:seen] += received[..., inner:]
            distance = positions[:, own, None] - positions[:, None, outer:inner]
            inside = (distance < width[:, None, None])[:, None, None]
            edge = attention[..., outer:inner] * inside
            sums[..., outer:inner] += _weighted(edge, weights.recovery[:, at])
    if not apart:
        score = mass.sum(dim=2)
    return Profile(score, mass, band, weights.recovery.sum(dim=1))


def _weighted(attention: Float[Tensor, "b h g q t"], weights: Float[Tensor, "b q"]) -> Float[Tensor, "b h g t"]:
    return (weights[:, None, None, None] @ attention).squeeze(-2)


def _first_within(positions: Int[Tensor, "b t"], row: int, width: Int[Tensor, " b"], seen: int, *, every: bool) -> int:
    """First column less than a width behind the row, in every sequence or in any; `seen` where there is none."""
    near = positions[:, row, None] - positions[:, :seen] < width[:, None]
    near = near.all(dim=0) if every else near.any(dim=0)
    return int(near.int().argmax()) if bool(near.any()) else seen
