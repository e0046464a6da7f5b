"""2/7 profile: queries and keys of the prompt -> the attention mass each head puts on each token.

Blockwise, in fp32, in memory that grows with t and not with t × t. Retained mass of any rule follows from two
column sums per query head, in total and inside the local band (FastGen, section 4.1; specification 9.1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from headwise.kernels import Kernels
from headwise.policies.base import Policy
from headwise.policies.size import quota_tokens
from headwise.types import Bool, Float, Int, LogitOptions, Tensor


@dataclass
class Profile:
    """Weighted column sums of the attention map of one layer; profiles of two chunks of queries can be added.

    Attributes:
        score: mass each key received from all query rows, summed over the group; what heavy hitters rank by.
        mass: mass each key received from the rows that the recovery test looks at, per query head.
        band: the same inside the local band, for each of `widths`.
        rows: total weight of the rows that the recovery test looks at.
        widths: the window widths asked for.
    """

    score: Float[Tensor, "b h t"]
    mass: Float[Tensor, "b h g t"]
    band: list[Float[Tensor, "b h g t"]]
    rows: Float[Tensor, " b"]
    widths: list[Int[Tensor, " b"]]

    def __add__(self, later: Profile) -> Profile:
        longer = later.score.shape[-1] - self.score.shape[-1]

        def grown(sums: Tensor) -> Tensor:
            return functional.pad(sums, (0, longer))

        return Profile(
            grown(self.score) + later.score,
            grown(self.mass) + later.mass,
            [grown(mine) + its for mine, its in zip(self.band, later.band, strict=True)],
            self.rows + later.rows,
            self.widths,
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
    kernels: Kernels,
) -> Profile:
    """Sum the attention of the newest q columns over all t, in total and inside each band.

    Args:
        mask: True where a query may see a key; None means causal.
        positions: of every column; the band of width w is where the query is less than w positions ahead.
        widths: one window width per sequence, for every distinct window of the policy.
    """

    def sums(counts: Float[Tensor, "b q"], bands: list[Tensor]) -> tuple[Tensor, Tensor]:
        read = (counts > 0).any(dim=0).nonzero().flatten()
        everything = len(read) == counts.shape[1]
        return kernels.column_mass(
            query if everything else query[:, :, :, read],
            keys,
            read + keys.shape[2] - counts.shape[1],
            mask if mask is None or everything else mask[:, read],
            options,
            counts if everything else counts[:, read],
            positions,
            torch.stack(bands) if bands else positions.new_zeros(0, len(positions)),
        )

    mass, band = sums(weights.recovery, widths)
    scoring = mass if weights.recovery is weights.score else sums(weights.score, [])[0]
    return Profile(scoring.sum(dim=2), mass, list(band), weights.recovery.sum(dim=1), widths)
