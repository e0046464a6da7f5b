"""Lineup: policies as words -> the rows of every table: the full cache, the policies, random eviction beside each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from headwise.errors import ConfigurationError
from headwise.eval.budgets import allot
from headwise.eval.stock import StockQuantized
from headwise.policies import Full, Policy, Random
from headwise.policies.budget import with_budget
from headwise.policies.words import describe_policy

FULL, RANDOM = "full", "random"


@dataclass(frozen=True)
class Entry:
    """One row.

    Attributes:
        label: different from all others.
        policy: None for random eviction at the size of another.
        twin_of: label of that other, which comes first.
        seed: of random eviction.
        series: the same for all sizes of one policy.
        budget: bytes as text, in place of the policy's own size; None where that holds.
    """

    label: str
    policy: Policy | None
    twin_of: str | None = None
    seed: int = 0
    series: str = ""
    budget: str | None = None

    def policy_at(self, kept: Mapping[str, float]) -> Policy:
        """The policy, given the share of rows that every other one has kept of the same item."""
        if self.policy is not None:
            return self.policy
        assert self.twin_of is not None
        return Random(keep=float(kept[self.twin_of]), seed=self.seed)

    def policy_for(self, model: PreTrainedModel, kept: Mapping[str, float], dtype: torch.dtype | None = None) -> Policy:
        """The same, for a model: it is what turns bytes into tokens.

        Args:
            dtype: of exact rows; None for the model's.

        Raises:
            ConfigurationError: when the budget is less than one token takes.
        """
        policy = self.policy_at(kept)
        if self.budget is None:
            return policy
        return with_budget(policy, self.budget, model.config.get_text_config(decoder=True), dtype or model.dtype)

    def describe(self) -> dict[str, Any]:
        """Plain values."""
        policy = None if self.policy is None else describe_policy(self.policy)
        head = {"label": self.label, "policy": policy, "twin_of": self.twin_of, "seed": self.seed}
        return head | {"series": self.series, "budget": self.budget}


def line_up(specs: Sequence[str], random: bool = True, seed: int = 0, budgets: Sequence[str] = ()) -> tuple[Entry, ...]:
    """The full cache, then every policy at every budget, each with random eviction that keeps as much of the same item.

    Args:
        specs: such as `snapkv:keep=0.25`; `transformers:quanto-int4` is transformers' own.
        random: whether random eviction takes part.
        seed: of random eviction.
        budgets: for the policies that do not state a size, see `allot`.

    Raises:
        UnknownPolicyError, ConfigurationError: for a policy that cannot be what it says, or is given twice.
    """
    entries = [Entry(FULL, Full(), series=FULL)]
    for room in (room for spec in specs for room in allot(spec.strip(), budgets)):
        if isinstance(room.policy, Full):
            continue
        if any((room.policy, room.bytes) == (entry.policy, entry.budget) for entry in entries):
            raise ConfigurationError(f"the policy {room.label!r} is given twice")
        drawn = isinstance(room.policy, Random)
        entries.append(Entry(room.label, room.policy, series=RANDOM if drawn else room.spec, budget=room.bytes))
        # A draw needs no other draw beside it, nor does what keeps everything.
        if random and not drawn and not isinstance(room.policy, StockQuantized):
            entries.append(Entry(f"random, size of {room.label}", None, room.label, seed, RANDOM))
    return tuple(entries)
