"""Scored: what a layer holds -> a score for every token, and the best of them.

A policy of this kind is one method, `score`. It looks at the prompt, and again when more tokens have come.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch.nn import functional

from headwise.policies.base import Policy, Rule
from headwise.policies.checks import check_choice, check_count, check_size
from headwise.policies.choice import Again, Choice, FormatLoss, PromptSummary, first_rung
from headwise.policies.evidence import Evidence
from headwise.policies.size import Of, Size, quota_tokens, whole
from headwise.policies.tokens import Tokens
from headwise.types import Bool, Float, Int, Tensor

# Newest queries that a later choice looks at, where one at the end of the prompt looks at all.
_NEWEST = 64
# Queries, and of how many that follow one another one is taken, where every row remembers what they give it.
_SAMPLED, _STRIDE = 32, 4
# Tokens from which on attention is no longer that of neighbours, which every token gets when it is new.
_NEAR = 16


@dataclass(frozen=True, kw_only=True)
class Rechoosing(Policy):
    """Chooses at the end of the prompt, and again among what is held whenever `choose_every` tokens have come.

    A head then has at most so many rows more than its size, or a twentieth of it where that is more.

    Args:
        of: what a fraction is of: all tokens "seen" so far, so that it grows with them, or those of the "prompt",
            from which is then chosen once, and what comes later is kept.
        choose_every: tokens between two choices, at least.
    """

    of: Of = "seen"
    choose_every: int = 32

    def __post_init__(self) -> None:
        check_choice("of", self.of, get_args(Of))
        check_count("choose_every", self.choose_every, 1)

    @property
    def again(self) -> Again | None:
        """By the newest queries, unless the prompt is all that is chosen from."""
        if self.of == "prompt":
            return None
        rows = self.query_rows
        return Again(self.choose_every, _NEWEST if rows is None else rows, size=self.size)

    @property
    def size(self) -> Size | None:
        """Rows of a head, where they are what is asked for."""
        return getattr(self, "keep", None)


class Scored(Rechoosing):
    """Keeps the tokens with the highest scores.

    Subclasses are frozen dataclasses with a field `keep`, and define `score`.
    """

    keep: Size

    def __post_init__(self) -> None:
        super().__post_init__()
        check_size("keep", self.keep)

    @property
    def query_rows(self) -> int | None:
        """How many of the newest queries `score` looks at; None for all of them."""
        return 0

    @property
    def rungs(self) -> tuple[Rule, ...]:
        """One rule for every head: what was chosen by score."""
        return (Chosen(),)

    @property
    def needs_evidence(self) -> bool:
        """To score by."""
        return True

    @abstractmethod
    def score(self, evidence: Evidence) -> Float[Tensor, "b h t"]:
        """What a token is worth to its KV head, in fp32; of padding columns it may be anything but NaN."""

    def format_loss(self, evidence: Evidence) -> FormatLoss | None:
        """What formats cost, where the policy chooses among several for every row."""
        return None

    def assess(self, evidence: Evidence) -> tuple[Float[Tensor, "b h t"], FormatLoss | None]:
        """Score and loss."""
        return self.score(evidence).float(), self.format_loss(evidence)

    def assess_again(self, evidence: Evidence) -> tuple[Float[Tensor, "b h t"], FormatLoss | None]:
        """Score and loss."""
        return self.score_again(evidence), self.format_loss(evidence)

    def score_again(self, evidence: Evidence) -> Float[Tensor, "b h t"]:
        """As at the end of the prompt, by the newest queries."""
        return self.score(evidence).float()

    def select(self, scores: Sequence[Float[Tensor, "b h _"]], tokens: Sequence[Tokens]) -> list[Bool[Tensor, "b h _"]]:
        """Which tokens stay, for each of the layers given: all where the policy `needs_all_layers`, else one."""
        return [highest(score, facts, self.quota(facts)) for score, facts in zip(scores, tokens, strict=True)]

    def choose(self, layers: Sequence[PromptSummary]) -> list[Choice]:
        """What `select` names, under the one rule there is."""
        scores = [layer.score for layer in layers if layer.score is not None]
        chosen = self.select(scores, [layer.tokens for layer in layers])
        return [Choice(first_rung(layer), tokens=tokens) for layer, tokens in zip(layers, chosen, strict=True)]

    def quota(self, tokens: Tokens) -> Int[Tensor, "b 1 1"]:
        """Tokens that a head of that layer may keep."""
        return quota_tokens(self.keep, whole(tokens, self.of))


class RepetitionScored(Scored):
    """Scores tokens by a repetition of the prompt, and keeps the best of the whole model.

    A gate, trained for the model, predicts what the repetition would find, and is almost free. Subclasses that offer it
    have a field `gate`: False for a repetition, True for the gates that come with headwise, or a folder with others.
    """

    gate: bool | str = False

    @property
    def again(self) -> Again | None:
        """By the most that queries paid to a row, from so far away that it is no neighbour, since it came."""
        if self.of == "prompt":
            return None
        return Again(self.choose_every, _SAMPLED, remembers=True, stride=_STRIDE, size=self.size)

    def remember(self, evidence: Evidence) -> Float[Tensor, "b h t"]:
        """The most that a query paid to each row: what was found of the prompt, and what it got from afar since."""
        if evidence.remembered is None:
            assert evidence.repetition_peaks is not None
            return evidence.repetition_peaks
        most = evidence.remembered
        for asked, attention in evidence.attention_by_query(evidence.query.shape[3]):
            far = asked[:, None, :, None] - evidence.position[:, :, None] >= _NEAR
            most = most.maximum((attention.amax(dim=2) * far).amax(dim=2))
        return most

    def score_again(self, evidence: Evidence) -> Float[Tensor, "b h t"]:
        """As at the end of the prompt, by what rows remember."""
        return self.score(replace(evidence, repetition_peaks=evidence.remembered)).float()

    @property
    def needs_all_layers(self) -> bool:
        """The choice is made over all layers, and the prompt is repeated once they have it."""
        return True

    @property
    def needs_repetition(self) -> bool:
        """Unless a gate predicts what would be found."""
        return self.gate is False

    @property
    def gates(self) -> bool | str:
        """As the field says."""
        return self.gate

    def select(self, scores: Sequence[Float[Tensor, "b h _"]], tokens: Sequence[Tokens]) -> list[Bool[Tensor, "b h _"]]:
        """The best of the model."""
        heads = sum(score.shape[1] for score in scores)
        return across(scores, tokens, self.quota(tokens[0]) * heads)


@dataclass(frozen=True)
class Chosen(Rule):
    """Keeps what was chosen, and everything later. Not registered: policies with scores use it."""

    @property
    def label(self) -> str:
        """For reports."""
        return "scored"

    @property
    def evicts(self) -> bool:
        """Only what a choice drops."""
        return False

    @property
    def chosen_once(self) -> bool:
        """By scores."""
        return True

    def keep(self, tokens: Tokens) -> Bool[Tensor, "b h n"]:
        """What was chosen, where there was a choice."""
        return tokens.valid if tokens.chosen is None else tokens.chosen & tokens.valid


def highest(score: Float[Tensor, "b h t"], tokens: Tokens, quota: Int[Tensor, "b 1 1"]) -> Bool[Tensor, "b h t"]:
    """The tokens with the highest scores of each head; of equal ones the earlier."""
    return (tokens.rank(score) < quota) & tokens.pool


def across(
    scores: Sequence[Float[Tensor, "b h _"]], tokens: Sequence[Tokens], quota: Tensor
) -> list[Bool[Tensor, "b h _"]]:
    """The highest scores of all the layers and heads given, so many for each sequence; of equal ones the first.

    Args:
        scores: of layers that need not hold equally many rows.
        quota: `[b, 1, 1]`.
    """
    pool = side_by_side([facts.pool for facts in tokens])
    values = side_by_side(scores).masked_fill(~pool, -torch.inf)
    flat = values.flatten(1)
    order = flat.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(flat.shape[1], device=flat.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places).view_as(values)
    chosen = (rank < quota[:, None]) & pool
    return [own[..., : score.shape[-1]] for own, score in zip(chosen.unbind(dim=1), scores, strict=True)]


def side_by_side(layers: Sequence[Tensor]) -> Tensor:
    """Tensors `[b, h, ...]` of several layers as one `[b, layers, h, n]`, the shorter ones filled up with zeros."""
    longest = max(each.shape[-1] for each in layers)
    return torch.stack([functional.pad(each, (0, longest - each.shape[-1])) for each in layers], dim=1)


def by_position(change: Callable[[Tensor], Tensor], scores: Tensor, evidence: Evidence) -> Tensor:
    """Scores `[b, h, ..., t]`, changed along the tokens in the order of their positions: rows of a store lie in none.

    Args:
        change: gives as many numbers as it gets; neighbours of a row are those that are left.
    """
    if evidence.position.shape[1] == 1:
        return change(scores)
    place = evidence.position.masked_fill(~evidence.real, torch.iinfo(torch.long).max)
    order = place.argsort(dim=-1, stable=True)
    order = order.view(*order.shape[:2], *[1] * (scores.dim() - 3), -1).expand_as(scores)
    return torch.empty_like(scores).scatter_(-1, order, change(scores.gather(-1, order)))


def newest_first(score: Float[Tensor, "b h t"], evidence: Evidence, rows: int) -> Float[Tensor, "b h t"]:
    """The scores, with the last `rows` real tokens above all others and the newest on top.

    Args:
        score: below 2.
    """
    return torch.where((evidence.age < rows) & evidence.real, 2.0 + evidence.position, score)
