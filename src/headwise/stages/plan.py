"""3/7 plan: evidence and facts about tokens -> one rule per (sequence, KV head), and the tokens of the prompt it keeps.

The policy chooses; the plan then holds for the life of the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from headwise.policies.base import Policy, Rule
from headwise.policies.choice import Choice, FormatLoss, PromptSummary
from headwise.policies.tokens import Tokens
from headwise.stages.mass_profile import MassProfile, retained_mass
from headwise.types import Bool, Float, Int, Tensor


@dataclass
class Plan:
    """The rule of every head of a layer.

    Attributes:
        rungs: the rules to choose from.
        choice: index into `rungs`.
        recovered: mass each rung retains, folded over the group; None where nothing had to be chosen.
        prompt: real tokens of the prompt, to which fractions refer.
        threshold: mass that was enough, infinite where only all of it was; None where nothing had to be chosen.
        matched: error of the outputs before and after rows were refitted; None where they were not.
    """

    rungs: tuple[Rule, ...]
    choice: Int[Tensor, "b h"]
    recovered: Float[Tensor, "rungs b h"] | None
    prompt: Int[Tensor, " b"]
    threshold: Float[Tensor, " b"] | None = None
    matched: Float[Tensor, "2 b h"] | None = None

    def __post_init__(self) -> None:
        self._refresh()

    def _refresh(self) -> None:
        self.chosen = [(index, self.rungs[index]) for index in self.choice.unique().tolist()]
        self.evicts = any(rule.evicts for _, rule in self.chosen)
        # Whether tokens of the prompt were dropped by a choice that was made once.
        self.chosen_once = any(rule.chosen_once for _, rule in self.chosen)
        self.scored = any("score" in rule.reads for _, rule in self.chosen)

    def keep(self, tokens: Tokens) -> Bool[Tensor, "b h n"]:
        """Which tokens every head keeps under its own rule."""
        kept = torch.zeros_like(tokens.valid)
        for index, rule in self.chosen:
            kept = kept | (rule.keep(tokens) & (self.choice == index)[:, :, None])
        if tokens.pinned is not None:
            kept = kept | tokens.pinned
        return kept & tokens.valid

    def select(self, indices: Int[Tensor, " new"]) -> None:
        """Keep the sequences at `indices`, in that order."""
        indices = indices.to(self.choice.device)
        self.choice = self.choice[indices]
        self.prompt = self.prompt[indices]
        if self.recovered is not None:
            self.recovered = self.recovered[:, indices]
        if self.matched is not None:
            self.matched = self.matched[:, indices]
        if self.threshold is not None:
            self.threshold = self.threshold[indices]
        self._refresh()

    def tensors(self) -> list[Tensor]:
        """Every tensor it holds on to."""
        return list(self.state().values())

    def state(self) -> dict[str, Tensor]:
        """What `restore` needs, by name."""
        named = {
            "choice": self.choice,
            "prompt": self.prompt,
            "recovered": self.recovered,
            "threshold": self.threshold,
            "matched": self.matched,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @classmethod
    def restore(cls, rungs: tuple[Rule, ...], state: dict[str, Tensor]) -> Plan:
        """A plan as `state` described it."""
        named = (state.get(name) for name in ("threshold", "matched"))
        return cls(rungs, state["choice"], state.get("recovered"), state["prompt"], *named)


@dataclass(frozen=True)
class Planned:
    """What comes of the choice for one layer.

    Attributes:
        keep: tokens of the prompt that stay.
        formats: of each of them, -1 for exact numbers; None for what the policy's precision says.
    """

    plan: Plan
    keep: Bool[Tensor, "b h t"]
    formats: Int[Tensor, "b h t"] | None


def summarise(
    policy: Policy,
    tokens: Tokens,
    mass: MassProfile | None,
    assessed: tuple[Float[Tensor, "b h t"] | None, FormatLoss | None],
) -> PromptSummary:
    """What is known of a layer, to choose by: what each rung would retain and at what size, and what tokens are worth.

    Args:
        mass: None where the policy has nothing to choose by it.
        assessed: scores and losses, as the policy assessed the evidence.
    """
    score, loss = pinned_first(assessed[0], tokens), assessed[1]
    selection = policy.selection
    if selection is None or mass is None:
        return PromptSummary(tokens, score, loss)
    recovered = retained_mass(policy.rungs, tokens, mass)
    recovered = recovered.amin(dim=-1) if selection.fold == "min" else recovered.mean(dim=-1)
    for index, rung in enumerate(policy.rungs):
        # Full is enough by definition, not by a sum of floats.
        if rung.keeps_all:
            recovered[index] = torch.inf
    kept = torch.stack([(rung.keep(tokens) & tokens.valid).sum(dim=-1) for rung in policy.rungs])
    return PromptSummary(tokens, score, loss, recovered, kept)


def pinned_first(score: Float[Tensor, "b h n"] | None, tokens: Tokens) -> Float[Tensor, "b h n"] | None:
    """Scores by which what is pinned comes first, so that it is within the size that was asked for."""
    return score if score is None or tokens.pinned is None else score.masked_fill(tokens.pinned, torch.inf)


def make_plans(policy: Policy, layers: Sequence[PromptSummary]) -> list[Planned]:
    """Let the policy choose, and apply each head's rule to the prompt.

    Args:
        layers: one, or all of them where the policy `needs_all_layers`.
    """
    return [_planned(policy, layer, choice) for layer, choice in zip(layers, policy.choose(layers), strict=True)]


def _planned(policy: Policy, layer: PromptSummary, choice: Choice) -> Planned:
    prompt = layer.tokens.prompt[:, 0, 0]
    plan = Plan(policy.rungs, choice.rung, choice.recovered, prompt, choice.threshold)
    return Planned(plan, plan.keep(replace(layer.tokens, chosen=choice.tokens)), choice.formats)
