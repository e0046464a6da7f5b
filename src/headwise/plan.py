"""3/7 plan: policy and profile -> one rule per (sequence, KV head), the cheapest that retains enough.

FastGen, equation 1: the argmin of the kept tokens over the rungs whose retained mass reaches the target.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from headwise.policies.base import Policy, Rule
from headwise.policies.full import Full
from headwise.profile import Profile
from headwise.types import Bool, Float, Int, Tensor, Tokens


@dataclass
class Plan:
    """The rule of every head of a layer, fixed for the life of the cache.

    Attributes:
        rungs: the rules to choose from.
        choice: index into `rungs`.
        recovered: mass each rung retains, folded over the group; None where nothing had to be chosen.
        prompt: real tokens of the prompt, to which fractions refer.
    """

    rungs: tuple[Rule, ...]
    choice: Int[Tensor, "b h"]
    recovered: Float[Tensor, "rungs b h"] | None
    prompt: Int[Tensor, " b"]

    def __post_init__(self) -> None:
        self._refresh()

    def _refresh(self) -> None:
        self.chosen = [(index, self.rungs[index]) for index in self.choice.unique().tolist()]
        self.evicts = any(not isinstance(rule, Full) for _, rule in self.chosen)
        self.scored = any("score" in rule.reads for _, rule in self.chosen)

    def keep(self, tokens: Tokens) -> Bool[Tensor, "b h n"]:
        """Which tokens every head keeps under its own rule."""
        kept = torch.zeros_like(tokens.valid)
        for index, rule in self.chosen:
            kept = kept | (rule.keep(tokens) & (self.choice == index)[:, :, None])
        return kept & tokens.valid

    def select(self, indices: Int[Tensor, " new"]) -> None:
        """Keep the sequences at `indices`, in that order."""
        indices = indices.to(self.choice.device)
        self.choice = self.choice[indices]
        self.prompt = self.prompt[indices]
        if self.recovered is not None:
            self.recovered = self.recovered[:, indices]
        self._refresh()


def distinct_widths(policy: Policy, prompt: Int[Tensor, " b"]) -> list[Int[Tensor, " b"]]:
    """Every window width the rungs use, once each; the profile needs a band for each of them."""
    widths: list[Tensor] = []
    for rung in policy.rungs:
        width = rung.width(prompt)
        if bool((width > 0).any()) and not any(torch.equal(width, other) for other in widths):
            widths.append(width)
    return widths


def make_plan(policy: Policy, tokens: Tokens, profile: Profile | None) -> Plan:
    """Choose the rule of every head.

    Args:
        tokens: the facts at the end of the prompt, as the last query row sees them.
        profile: None where the policy has nothing to choose.
    """
    batch, heads, _ = tokens.valid.shape
    prompt = tokens.prompt[:, 0, 0]
    selection = policy.selection
    if selection is None or profile is None:
        choice = torch.zeros(batch, heads, dtype=torch.long, device=tokens.valid.device)
        return Plan(policy.rungs, choice, None, prompt)

    recovered = _recovered(policy.rungs, tokens, profile)
    recovered = recovered.amin(dim=-1) if selection.fold == "min" else recovered.mean(dim=-1)
    kept = torch.stack([(rung.keep(tokens) & tokens.valid).sum(dim=-1) for rung in policy.rungs])
    enough = recovered >= selection.threshold
    for index, rung in enumerate(policy.rungs):
        # Full is enough by definition, not by a sum of floats; and nothing less than full recovers everything.
        if isinstance(rung, Full):
            enough[index] = True
        elif selection.recovery >= 1:
            enough[index] = False
    never = torch.iinfo(kept.dtype).max
    choice = kept.masked_fill(~enough, never).min(dim=0).indices
    return Plan(policy.rungs, choice, recovered, prompt)


def _recovered(rungs: tuple[Rule, ...], tokens: Tokens, profile: Profile) -> Float[Tensor, "rungs b h g"]:
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
