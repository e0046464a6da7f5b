"""Contenders: policies as words -> the rows of every table: the full cache, the policies, random eviction by each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from headwise.errors import ConfigurationError
from headwise.eval.budgets import at_budgets
from headwise.eval.cache_kinds import CacheKind, PolicyCache, StockQuantized, parse_stock
from headwise.hosts.transformers.model_facts import read_facts
from headwise.policies import Full, Policy, Random
from headwise.policies.budget import with_budget
from headwise.policies.words import describe_policy

FULL, RANDOM = "full", "random"


@dataclass(frozen=True)
class Contender(ABC):
    """One row.

    Attributes:
        label: different from all others.
        series: the same for all sizes of one policy.
    """

    label: str
    series: str

    @property
    def twin_of(self) -> str | None:
        """Label of the row whose size it has, which comes first; None where it has a size of its own."""
        return None

    @abstractmethod
    def cache_kind(
        self, model: PreTrainedModel, kept: Mapping[str, float], dtype: torch.dtype | None = None
    ) -> CacheKind:
        """What an item is measured with.

        Args:
            model: turns a budget of bytes into tokens.
            kept: share of the item's rows that every row before has kept, by label.
            dtype: of exact rows; None for the model's.

        Raises:
            ConfigurationError: when the budget is less than one token takes.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Plain values."""

    def _describe(self, policy: dict[str, Any] | None, *, seed: int = 0, budget: str | None = None) -> dict[str, Any]:
        head = {"label": self.label, "policy": policy, "twin_of": self.twin_of, "seed": seed}
        return head | {"series": self.series, "budget": budget}


@dataclass(frozen=True)
class PolicyContender(Contender):
    """A policy of headwise.

    Attributes:
        budget: bytes as text, in place of the policy's own size; None where that holds.
    """

    policy: Policy
    budget: str | None = None

    def cache_kind(
        self, model: PreTrainedModel, kept: Mapping[str, float], dtype: torch.dtype | None = None
    ) -> PolicyCache:
        """The policy, with so many tokens as the bytes are."""
        if self.budget is None:
            return PolicyCache(self.policy)
        layers = read_facts(model)[0].compressed_shapes
        return PolicyCache(with_budget(self.policy, self.budget, layers, dtype or model.dtype))

    def describe(self) -> dict[str, Any]:
        """Plain values."""
        return self._describe(describe_policy(self.policy), budget=self.budget)


@dataclass(frozen=True)
class RandomOfSameSize(Contender):
    """Random eviction that keeps as much of the same item as another contender.

    Attributes:
        other: label of that other.
    """

    other: str
    seed: int = 0

    @property
    def twin_of(self) -> str:
        """The other."""
        return self.other

    def cache_kind(
        self, model: PreTrainedModel, kept: Mapping[str, float], dtype: torch.dtype | None = None
    ) -> PolicyCache:
        """Random eviction of that size."""
        return PolicyCache(Random(keep=float(kept[self.other]), seed=self.seed))

    def describe(self) -> dict[str, Any]:
        """Plain values."""
        return self._describe(None, seed=self.seed)


@dataclass(frozen=True)
class StockContender(Contender):
    """transformers' own quantized cache."""

    kind: StockQuantized

    def cache_kind(
        self, model: PreTrainedModel, kept: Mapping[str, float], dtype: torch.dtype | None = None
    ) -> StockQuantized:
        """The same for all models and items."""
        return self.kind

    def describe(self) -> dict[str, Any]:
        """Plain values."""
        return self._describe(self.kind.describe())


def make_contenders(
    specs: Sequence[str], random: bool = True, seed: int = 0, budgets: Sequence[str] = ()
) -> tuple[Contender, ...]:
    """The full cache, then every policy at every budget, each with random eviction that keeps as much of the same item.

    Args:
        specs: such as `snapkv:keep=0.25`; `transformers:quanto-int4` is transformers' own.
        random: whether random eviction takes part.
        seed: of random eviction.
        budgets: for the policies that do not state a size, see `at_budgets`.

    Raises:
        UnknownPolicyError, ConfigurationError: for a policy that cannot be what it says, or is given twice.
    """
    made: dict[object, Contender] = {}

    def add(what: object, contender: Contender) -> None:
        if what in made:
            raise ConfigurationError(f"the policy {contender.label!r} is given twice")
        made[what] = contender

    add((Full(), None), PolicyContender(FULL, FULL, Full()))
    for spec in map(str.strip, specs):
        stock = parse_stock(spec)
        if stock is not None:
            # It keeps everything: there is nothing to evict at random.
            add(stock, StockContender(spec, spec, stock))
            continue
        for sized in at_budgets(spec, budgets):
            if isinstance(sized.policy, Full):
                continue
            drawn = isinstance(sized.policy, Random)
            series = RANDOM if drawn else sized.spec
            add((sized.policy, sized.bytes), PolicyContender(sized.label, series, sized.policy, sized.bytes))
            # A draw needs no other draw beside it.
            if random and not drawn:
                add(sized.label, RandomOfSameSize(f"random, size of {sized.label}", RANDOM, sized.label, seed))
    return tuple(made.values())
