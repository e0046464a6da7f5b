"""Mass profile: queries and keys of the prompt -> the attention mass each head puts on each token.

Blockwise, in fp32, in memory that grows with t and not with t × t. Retained mass of any rule follows from two
column sums per query head, in total and inside the local band (FastGen, section 4.1; specification 9.1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from headwise.kernels.attention import counting
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
        rows_read: query rows that were looked at.
    """

    score: Float[Tensor, "b h t"]
    mass: Float[Tensor, "b h g t"]
    band: list[Float[Tensor, "b h g t"]]
    rows: Float[Tensor, " b"]
    widths: list[Int[Tensor, " b"]]
    rows_read: int

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
            self.rows_read + later.rows_read,
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
    scoring, mass, band = None, *kernels.column_mass(counting(_request(map, weights.recovery, positions, widths)))
    if weights.recovery is not weights.score:
        scoring, _ = kernels.column_mass(counting(_request(map, weights.score, positions, [])))
    return _profile(weights, widths, scoring, mass, band)


def attend_and_profile(
    map: AttentionMap,
    values: Float[Tensor, "b h t e"],
    weights: RowWeights,
    positions: Int[Tensor, "b t"],
    widths: list[Int[Tensor, " b"]],
    kernels: Kernels,
) -> tuple[Float[Tensor, "b h g q e"], MassProfile]:
    """Attention of the newest q columns, and what `profile_mass` gives, which costs little beside it."""
    if weights.recovery is weights.score:
        request = _request(map, weights.recovery, positions, widths)
        output, mass, band = kernels.attention_and_mass(request, values)
        return output, _profile(weights, widths, None, mass, band)
    # Of the two, the recovery test looks at fewer rows.
    output, scoring, _ = kernels.attention_and_mass(_request(map, weights.score, positions, []), values)
    mass, band = kernels.column_mass(counting(_request(map, weights.recovery, positions, widths)))
    return output, _profile(weights, widths, scoring, mass, band)


def _profile(
    weights: RowWeights,
    widths: list[Int[Tensor, " b"]],
    scoring: Float[Tensor, "b h g t"] | None,
    mass: Float[Tensor, "b h g t"],
    band: Float[Tensor, "w b h g t"],
) -> MassProfile:
    """Of the masses from the rows that rank tokens, None where they are the others, and of the recovery test's."""
    score = (mass if scoring is None else scoring).sum(dim=2)
    read = int(((weights.score > 0) | (weights.recovery > 0)).any(dim=0).sum())
    return MassProfile(score, mass, list(band), weights.recovery.sum(dim=1), widths, read)


def _request(
    map: AttentionMap, counts: Float[Tensor, "b q"], positions: Int[Tensor, "b t"], widths: list[Int[Tensor, " b"]]
) -> MassRequest:
    bounds = torch.stack(widths) if widths else positions.new_zeros(0, len(positions))
    return MassRequest(map, counts, positions, bounds)


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
