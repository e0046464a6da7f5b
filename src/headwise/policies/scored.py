"""Scored: what a layer holds at the end of the prompt -> a score for every token, and the best of them.

A policy of this kind is one method, `score`. It looks at the prompt once; what is generated afterwards is kept.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from headwise.policies.base import Policy, Rule
from headwise.policies.checks import check_size
from headwise.policies.choice import Choice, FormatLoss, PromptSummary, first_rung
from headwise.policies.evidence import Evidence
from headwise.policies.size import Size, quota_tokens
from headwise.policies.tokens import Tokens
from headwise.types import Bool, Float, Int, Tensor


class Scored(Policy):
    """Keeps the tokens of the prompt with the highest scores, and everything that is generated.

    Subclasses are frozen dataclasses with a field `keep`, and define `score`.
    """

    keep: Size

    def __post_init__(self) -> None:
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
        """What formats cost, where the policy chooses among several for every head."""
        return None

    def assess(self, evidence: Evidence) -> tuple[Float[Tensor, "b h t"], FormatLoss | None]:
        """Score and loss."""
        return self.score(evidence).float(), self.format_loss(evidence)

    def select(self, scores: Sequence[Float[Tensor, "b h t"]], tokens: Sequence[Tokens]) -> list[Bool[Tensor, "b h t"]]:
        """Which tokens stay, for each of the layers given: all where the policy `needs_all_layers`, else one."""
        return [highest(score, facts, self.quota(facts)) for score, facts in zip(scores, tokens, strict=True)]

    def choose(self, layers: Sequence[PromptSummary]) -> list[Choice]:
        """What `select` names, under the one rule there is."""
        scores = [layer.score for layer in layers if layer.score is not None]
        chosen = self.select(scores, [layer.tokens for layer in layers])
        return [Choice(first_rung(layer), tokens=tokens) for layer, tokens in zip(layers, chosen, strict=True)]

    def quota(self, tokens: Tokens) -> Int[Tensor, "b 1 1"]:
        """Tokens that a head of that layer may keep."""
        return quota_tokens(self.keep, tokens.prompt)


class RepetitionScored(Scored):
    """Scores tokens by a repetition of the prompt, and keeps the best of the whole model.

    A gate, trained for the model, predicts what the repetition would find, and is almost free. Subclasses that offer it
    have a field `gate`: False for a repetition, True for the gates that come with headwise, or a folder with others.
    """

    gate: bool | str = False

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

    def select(self, scores: Sequence[Float[Tensor, "b h t"]], tokens: Sequence[Tokens]) -> list[Bool[Tensor, "b h t"]]:
        """The best of the model."""
        heads = sum(score.shape[1] for score in scores)
        return across(scores, tokens, self.quota(tokens[0]) * heads)


@dataclass(frozen=True)
class Chosen(Rule):
    """Keeps what was chosen from the prompt, and everything later. Not registered: policies with scores use it."""

    @property
    def label(self) -> str:
        """For reports."""
        return "scored"

    @property
    def evicts(self) -> bool:
        """Only from the prompt."""
        return False

    @property
    def chosen_once(self) -> bool:
        """By the scores of the prompt."""
        return True

    def keep(self, tokens: Tokens) -> Bool[Tensor, "b h n"]:
        """What was chosen, where there was a choice."""
        return tokens.valid if tokens.chosen is None else tokens.chosen & tokens.valid


def highest(score: Float[Tensor, "b h t"], tokens: Tokens, quota: Int[Tensor, "b 1 1"]) -> Bool[Tensor, "b h t"]:
    """The tokens with the highest scores of each head; of equal ones the earlier."""
    return (tokens.rank(score) < quota) & tokens.pool


def across(
    scores: Sequence[Float[Tensor, "b h t"]], tokens: Sequence[Tokens], quota: Tensor
) -> list[Bool[Tensor, "b h t"]]:
    """The highest scores of all the layers and heads given, so many for each sequence; of equal ones the first.

    Args:
        quota: `[b, 1, 1]`.
    """
    pool = torch.stack([facts.pool for facts in tokens], dim=1)
    values = torch.stack(list(scores), dim=1).masked_fill(~pool, -torch.inf)
    flat = values.flatten(1)
    order = flat.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(flat.shape[1], device=flat.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places).view_as(values)
    chosen = (rank < quota[:, None]) & pool
    return list(chosen.unbind(dim=1))


def newest_first(score: Float[Tensor, "b h t"], evidence: Evidence, rows: int) -> Float[Tensor, "b h t"]:
    """The scores, with the last `rows` real tokens above all others and the newest on top.

    Args:
        score: at most 1.
    """
    return torch.where((evidence.age < rows) & evidence.real, 2.0 + evidence.position, score)
