"""Scored: what a layer holds at the end of the prompt -> a score for every token, and the best of them.

A policy of this kind is one method, `score`. It looks at the prompt once; what is generated afterwards is kept.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from headwise.errors import ConfigurationError
from headwise.kernels.attention import causal, logits_of, probabilities, query_blocks
from headwise.policies.base import Policy, Rule
from headwise.policies.size import Size, check_size, quota_tokens
from headwise.types import Bool, Float, Int, LogitOptions, Tensor, Tokens

# Rotates vectors `[b, h, n, d]` to the positions `[b, n]`, or back from them where the last argument is True.
Rotation = Callable[[Tensor, Tensor, bool], Tensor]


@dataclass(frozen=True)
class Evidence:
    """What one layer holds at the end of the prompt.

    Attributes:
        query: of the newest q columns; as many as the policy asked for, or more.
        mask: True where such a query sees a column; None means causal and no padding.
        positions, real: of every column.
        rotation: the model's rotary embedding; None where it has none that is known.
        reconstruction: the largest attention that each token received while the model repeated the prompt, or what a
            gate predicts of it; None where the policy did not ask for it.
        row_bytes: of a row that is stored exactly.
    """

    query: Float[Tensor, "b h g q d"]
    keys: Float[Tensor, "b h t d"]
    values: Float[Tensor, "b h t e"]
    mask: Bool[Tensor, "b q t"] | None
    options: LogitOptions
    positions: Int[Tensor, "b t"]
    real: Bool[Tensor, "b t"]
    rotation: Rotation | None
    reconstruction: Float[Tensor, "b h t"] | None
    row_bytes: int = 0

    @property
    def length(self) -> Int[Tensor, "b 1 1"]:
        """Real tokens of each sequence."""
        return self.real.sum(dim=1)[:, None, None]

    @property
    def position(self) -> Int[Tensor, "b 1 t"]:
        """Of every column, for all heads."""
        return self.positions[:, None, :]

    def attention(self, rows: int) -> Iterator[Float[Tensor, "b h g r t"]]:
        """Attention of the last real tokens over all columns, a few rows at a time; 0 for rows there are none of.

        Args:
            rows: how many in all; there are fewer where the prompt is shorter.
        """
        at, there = self._newest(rows)
        group, dim = self.query.shape[2], self.query.shape[-1]
        heads = self.keys.shape[1]
        index = at[:, None, None, :, None].expand(-1, heads, group, -1, dim)
        query, columns = self.query.gather(3, index), at + self.keys.shape[2] - self.query.shape[3]
        for block in query_blocks(query, self.keys.shape[2]):
            weights = logits_of(query[:, :, :, block], self.keys, self.options)
            if self.mask is None:
                visible = causal(columns[0, block], self.keys.shape[2])[None].expand(len(at), -1, -1)
            else:
                width = self.mask.shape[-1]
                visible = self.mask.gather(1, at[:, block, None].expand(-1, -1, width))
            visible = (visible & there[:, block, None])[:, None, None]
            yield probabilities(weights, visible, self.options)

    def mean_attention(self, rows: int) -> Float[Tensor, "b h g t"]:
        """The mean over the last real tokens, or over as many as there are."""
        total = sum(block.sum(dim=3) for block in self.attention(rows))
        assert isinstance(total, Tensor)
        return total / self.length.clamp(max=rows)[..., None]

    def _newest(self, rows: int) -> tuple[Int[Tensor, "b r"], Bool[Tensor, "b r"]]:
        """Index of the last real query rows of each sequence, in order, and whether there is one."""
        real = self.real[:, -self.query.shape[3] :]
        order = torch.arange(1, real.shape[1] + 1, device=real.device) * real
        newest = order.topk(min(rows, real.shape[1]), dim=1).values.sort(dim=1).values
        return (newest - 1).clamp(min=0), newest > 0


@dataclass(frozen=True)
class Damage:
    """What it costs the heads of a layer to be stored in each of some formats, exact rows first.

    Attributes:
        losses: of accuracy, in the unit of the scores.
        row_bytes: of a row.
    """

    losses: Float[Tensor, "formats b h"]
    row_bytes: tuple[int, ...]


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
    def reconstructs(self) -> bool:
        """Whether the model is to repeat the prompt before it is scored."""
        return False

    @property
    def rungs(self) -> tuple[Rule, ...]:
        """One rule for every head: what was chosen by score."""
        return (Chosen(),)

    @abstractmethod
    def score(self, evidence: Evidence) -> Float[Tensor, "b h t"]:
        """What a token is worth to its KV head, in fp32; of padding columns it may be anything but NaN."""

    def select(self, scores: Sequence[Float[Tensor, "b h t"]], tokens: Sequence[Tokens]) -> list[Bool[Tensor, "b h t"]]:
        """Which tokens stay, for each of the layers given: all of them where the policy is `deferred`, else one."""
        return [highest(score, facts, self.quota(facts)) for score, facts in zip(scores, tokens, strict=True)]

    def damage(self, evidence: Evidence) -> Damage | None:
        """What formats cost, where the policy chooses among several for every head."""
        return None

    def choose(
        self, scores: Sequence[Float[Tensor, "b h t"]], tokens: Sequence[Tokens], damages: Sequence[Damage]
    ) -> tuple[list[Bool[Tensor, "b h t"]], list[Int[Tensor, "b h"]] | list[None]]:
        """Which tokens stay, and the format of every head; None for the first that there is.

        Args:
            damages: of the layers, where the policy gave them.
        """
        return self.select(scores, tokens), [None] * len(scores)

    def quota(self, tokens: Tokens) -> Int[Tensor, "b 1 1"]:
        """Tokens that a head of that layer may keep."""
        return quota_tokens(self.keep, tokens.prompt)


class Repeated(Scored):
    """Scores tokens by a repetition of the prompt, and keeps the best of the whole model.

    A gate, trained for the model, predicts what the repetition would find, and is almost free. Subclasses that offer it
    have a field `gate`: False for a repetition, True for the gates that come with headwise, or a folder with others.
    """

    gate: bool | str = False

    @property
    def deferred(self) -> bool:
        """The choice is made over all layers, and the prompt is repeated once they have it."""
        return True

    @property
    def reconstructs(self) -> bool:
        """Unless a gate predicts what would be found."""
        return self.gate is False

    def select(self, scores: Sequence[Float[Tensor, "b h t"]], tokens: Sequence[Tokens]) -> list[Bool[Tensor, "b h t"]]:
        """The best of the model."""
        heads = sum(score.shape[1] for score in scores)
        return across(scores, tokens, self.quota(tokens[0]) * heads)


def check_gate(value: object) -> None:
    """Refuse what is neither a switch nor the name of a folder.

    Raises:
        ConfigurationError: with what was given.
    """
    if not isinstance(value, bool | str) or value == "":
        raise ConfigurationError(f"gate must be True, False or the folder of trained gates, got {value!r}")


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
    age = evidence.length - 1 - evidence.position
    return torch.where((age < rows) & evidence.real[:, None], 2.0 + evidence.position, score)
