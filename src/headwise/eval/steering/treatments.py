"""Treatments: a way to tell a model what is marked, and a policy -> the cache for a prompt, and how that is written."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headwise.eval.cache_kinds import PolicyCache
from headwise.eval.contenders import Contender
from headwise.hosts.transformers.cache import HeadwiseCache
from headwise.policies import Policy
from headwise.policies.words import describe_policy
from headwise.steer.heads import Heads
from headwise.steer.spans import Marked
from headwise.steer.steering import Steering
from headwise.training.heads.run import steerable_heads

# What a user without any tool does to emphasise something, and what steering does.
Way = Literal["nothing", "asterisks", "quotes", "examples", "heads", "every head", "random heads"]

_WRAPS = {"asterisks": "*", "quotes": '"'}


@dataclass(frozen=True)
class Treatment(PolicyCache):
    """A policy, and how the model is told what is marked.

    Attributes:
        heads: by layer as pairs, of the ways that steer some; None for all of a layer.
        alpha: of the steering.
        seed: of random heads.
    """

    way: Way = "nothing"
    heads: tuple[tuple[int, tuple[int, ...] | None], ...] = ()
    alpha: float = 0.01
    seed: int = 0

    @property
    def examples(self) -> bool:
        """Whether prompts begin with examples that are answered."""
        return self.way == "examples"

    def written(self, text: str, spans: Sequence[tuple[int, int]]) -> str:
        """A prompt as it is given to the model: with signs around what is marked, where that is the way.

        Args:
            spans: ranges of characters, in order.
        """
        sign = _WRAPS.get(self.way, "")
        for start, stop in reversed(spans):
            text = f"{text[:start]}{sign}{text[start:stop]}{sign}{text[stop:]}"
        return text

    def make(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompt_tokens: int,
        options: dict[str, Any],
    ) -> HeadwiseCache:
        """One that is steered, where that is the way."""
        return super().make(model, tokenizer, prompt_tokens, {**options, "steering": self.steering(model)})

    def steering(self, model: PreTrainedModel) -> Steering | None:
        """How attention is steered; None where it is not."""
        if self.way == "every head":
            return Steering(None, self.alpha)
        if self.way == "heads":
            return Steering(dict(self.heads), self.alpha)
        if self.way != "random heads":
            return None
        layers, heads = steerable_heads(model)
        everything = [(layer, head) for layer in layers for head in range(heads)]
        drawn: dict[int, list[int]] = {}
        count = sum(heads if own is None else len(own) for _, own in self.heads)
        for layer, head in random.Random(f"heads {self.seed}").sample(everything, count):
            drawn.setdefault(layer, []).append(head)
        return Steering(drawn, self.alpha)

    def mark(self, cache: HeadwiseCache, marked: Marked) -> None:
        """Say what is marked, where that steers anything."""
        if self.way in ("every head", "heads", "random heads"):
            cache.mark(marked)

    def describe(self) -> dict[str, Any]:
        """The policy's name and parameters, and the way."""
        return {**describe_policy(self.policy), "way": self.way, "heads": [list(each) for each in self.heads]}


@dataclass(frozen=True)
class TreatmentContender(Contender):
    """One row."""

    treatment: Treatment

    def cache_kind(self, model: PreTrainedModel, kept: Mapping[str, float], dtype: Any = None) -> Treatment:
        """The same for all models and items."""
        return self.treatment

    def describe(self) -> dict[str, Any]:
        """Plain values."""
        return self._describe(self.treatment.describe())


def make_treatments(
    policies: Mapping[str, Policy], heads: Mapping[str, Heads], alpha: float, ways: Sequence[Way], draws: int
) -> tuple[TreatmentContender, ...]:
    """The rows of a table: every way, under every policy.

    Args:
        policies: by what they are called.
        heads: files of them by what these are called; the first gives how many random ones are drawn.
        alpha: of the steering.
        ways: which of them.
        draws: of random heads.
    """
    found = []
    for words, policy in policies.items():
        behind = "" if words == "full" else f", {words}"
        for way in ways:
            if way == "heads":
                rows = {f"heads of {name}": Treatment(policy, way, _pairs(own), alpha) for name, own in heads.items()}
            elif way == "random heads":
                own = _pairs(next(iter(heads.values())))
                rows = {f"random heads {seed + 1}": Treatment(policy, way, own, alpha, seed) for seed in range(draws)}
            else:
                rows = {way: Treatment(policy, way, (), alpha)}
            found += [TreatmentContender(f"{row}{behind}", row, each) for row, each in rows.items()]
    return tuple(found)


def _pairs(heads: Heads) -> tuple[tuple[int, tuple[int, ...] | None], ...]:
    return tuple(heads.items())
