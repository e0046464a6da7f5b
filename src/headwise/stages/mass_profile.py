"""Mass profile: queries and keys of the prompt -> the attention mass each head puts on each token.

Blockwise, in fp32, in memory that grows with t and not with t × t. Retained mass of any rule follows from two
column sums per query head, in total and inside the local band (FastGen, section 4.1; specification 9.1).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from headwise.kernels.interface import AttentionMap, Kernels, MassRequest
from headwise.policies.base import Policy, Rule
from headwise.policies.size import quota_tokens
from headwise.policies.tokens import Tokens
from headwise.types import Bool, Float, Int, Tensor


@dataclass
class MassProfile:
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

    def tensors(self) -> list[Tensor]:
        """Every tensor it holds on to."""
        return [self.score, self.mass, *self.band, self.rows, *self.widths]

    def __add__(self, later: MassProfile) -> MassProfile:
        longer = later.score.shape[-1] - self.score.shape[-1]

        def grown(sums: Tensor) -> Tensor:
            return functional.pad(sums, (0, longer))

        return MassProfile(
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


def profile_mass(
    map: AttentionMap,
    weights: RowWeights,
    positions: Int[Tensor, "b t"],
    widths: list[Int[Tensor, " b"]],
    kernels: Kernels,
) -> MassProfile:
    """Sum the attention of the newest q columns over all t, in total and inside each band.

    Args:
        positions: of every column; the band of width w is where the query is less than w positions ahead.
        widths: one window width per sequence, for every distinct window of the policy.
    """
    first = map.keys.shape[2] - map.query.shape[3]

    def sums(counts: Float[Tensor, "b q"], bands: list[Tensor]) -> tuple[Tensor, Tensor]:
        read = (counts > 0).any(dim=0).nonzero().flatten()
        query, mask, marks = map.query, map.mask, map.marks
        if len(read) < counts.shape[1]:
            # Only rows that count; the others are not even multiplied.
            query, counts = query[:, :, :, read], counts[:, read]
            mask = None if mask is None else mask[:, read]
            marks = None if marks is None else replace(marks, gates=marks.gates[..., read])
        asked = replace(map, query=query, mask=mask, columns=read + first, marks=marks)
        bounds = torch.stack(bands) if bands else positions.new_zeros(0, len(positions))
        return kernels.column_mass(MassRequest(asked, counts, positions, bounds))

    mass, band = sums(weights.recovery, widths)
    scoring = mass if weights.recovery is weights.score else sums(weights.score, [])[0]
    return MassProfile(scoring.sum(dim=2), mass, list(band), weights.recovery.sum(dim=1), widths)


def distinct_widths(policy: Policy, prompt: Int[Tensor, " b"]) -> list[Int[Tensor, " b"]]:
    """Every window width the rungs use, once each; the profile needs a band for each of them."""
    widths: list[Tensor] = []
    for rung in policy.rungs:
        width = rung.width(prompt)
        if bool((width > 0).any()) and not any(torch.equal(width, other) for other in widths):
            widths.append(width)
    return widths


def retained_mass(rungs: tuple[Rule, ...], tokens: Tokens, profile: MassProfile) -> Float[Tensor, "rungs b h g"]:
    """Share of the attention mass that each rule retains, per query head: 1 minus what it drops.

    What is dropped is the mass outside the band on keys that the rule does not keep for every row. Counting the
    dropped mass keeps the sum exact for a rule that drops nothing, and leaves a sink logit's share with the kept.
    """
    prompt = tokens.prompt[:, 0, 0]
    dropped = []
    for rung in rungs:
        width = rung.width(prompt)
        outside = profile.mass
        for known, band in zip(profile.widths, profile.band, strict=True):
            if torch.equal(width, known):
                outside = profile.mass - band
        leaves = (~rung.static(tokens)).to(outside.dtype)
        dropped.append(outside @ leaves[..., None])
    return (1 - torch.stack(dropped)[..., 0] / profile.rows.clamp(min=1)[:, None, None]).clamp(0, 1)
