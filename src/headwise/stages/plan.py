"""3/7 plan: policy and profile -> one rule per (sequence, KV head), the cheapest that retains enough.

FastGen, equation 1: the argmin of the kept tokens over the rungs whose retained mass reaches the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from headwise.policies.base import Policy, Rule, Selection
from headwise.policies.full import Full
from headwise.policies.scored import Chosen, Damage, Scored
from headwise.policies.size import quota_tokens
from headwise.stages.profile import Profile
from headwise.types import Bool, Float, Int, Tensor, Tokens


@dataclass
class Plan:
    """The rule of every head of a layer, fixed for the life of the cache.

    Attributes:
        rungs: the rules to choose from.
        choice: index into `rungs`.
        recovered: mass each rung retains, folded over the group; None where nothing had to be chosen.
        prompt: real tokens of the prompt, to which fractions refer.
        threshold: mass that was enough, infinite where only all of it was; None where nothing had to be chosen.
        formats: of the older rows, by index into the policy's precision, -1 for exact ones; None where no head has
            another than the first. Only until the store is filled, which knows them from then on.
    """

    rungs: tuple[Rule, ...]
    choice: Int[Tensor, "b h"]
    recovered: Float[Tensor, "rungs b h"] | None
    prompt: Int[Tensor, " b"]
    threshold: Float[Tensor, " b"] | None = None
    formats: Int[Tensor, "b h"] | None = None

    def __post_init__(self) -> None:
        self._refresh()

    def _refresh(self) -> None:
        self.chosen = [(index, self.rungs[index]) for index in self.choice.unique().tolist()]
        self.evicts = any(rule.evicts for _, rule in self.chosen)
        # Whether tokens of the prompt were dropped by a choice that was made once.
        self.settled = any(isinstance(rule, Chosen) for _, rule in self.chosen)
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
        if self.threshold is not None:
            self.threshold = self.threshold[indices]
        self._refresh()


def distinct_widths(policy: Policy, prompt: Int[Tensor, " b"]) -> list[Int[Tensor, " b"]]:
    """Every window width the rungs use, once each; the profile needs a band for each of them."""
    widths: list[Tensor] = []
    for rung in policy.rungs:
        width = rung.width(prompt)
        if bool((width > 0).any()) and not any(torch.equal(width, other) for other in widths):
            widths.append(width)
    return widths


@dataclass(frozen=True)
class Weighed:
    """What is known of a layer at the end of its prompt, to choose by.

    Attributes:
        tokens: the facts, as the last query row sees them.
        score: what each token is worth, where the policy scores them.
        recovered: mass each rung retains, folded over the group, and
        kept: tokens it keeps; both where a rung has to be chosen.
        damage: of the formats a head may get, where the policy chooses them.
    """

    tokens: Tokens
    score: Float[Tensor, "b h t"] | None = None
    recovered: Float[Tensor, "rungs b h"] | None = None
    kept: Int[Tensor, "rungs b h"] | None = None
    damage: Damage | None = None


def weigh(policy: Policy, tokens: Tokens, profile: Profile | None, score: Float[Tensor, "b h t"] | None) -> Weighed:
    """What each rung would retain, and at what size.

    Args:
        profile: None where the policy has nothing to choose.
    """
    selection = policy.selection
    if selection is None or profile is None:
        return Weighed(tokens, score)
    recovered = _recovered(policy.rungs, tokens, profile)
    recovered = recovered.amin(dim=-1) if selection.fold == "min" else recovered.mean(dim=-1)
    for index, rung in enumerate(policy.rungs):
        # Full is enough by definition, not by a sum of floats.
        if isinstance(rung, Full):
            recovered[index] = torch.inf
    kept = torch.stack([(rung.keep(tokens) & tokens.valid).sum(dim=-1) for rung in policy.rungs])
    return Weighed(tokens, score, recovered, kept)


def make_plans(policy: Policy, layers: Sequence[Weighed]) -> list[tuple[Plan, Bool[Tensor, "b h t"]]]:
    """Choose the rule of every head, and the tokens of the prompt that it keeps.

    Args:
        layers: one, or all of them where the policy is `deferred`.
    """
    chosen: list[Bool[Tensor, "b h t"]] | list[None] = [None] * len(layers)
    formats: list[Int[Tensor, "b h"]] | list[None] = [None] * len(layers)
    if isinstance(policy, Scored):
        scores = [layer.score for layer in layers if layer.score is not None]
        damages = [layer.damage for layer in layers if layer.damage is not None]
        chosen, formats = policy.choose(scores, [layer.tokens for layer in layers], damages)
    threshold = None if policy.selection is None else _threshold(policy.selection, layers)
    made = []
    for layer, named, format in zip(layers, chosen, formats, strict=True):
        plan = _plan(policy, layer, threshold)
        plan.formats = format
        made.append((plan, plan.keep(replace(layer.tokens, chosen=named))))
    return made


def _plan(policy: Policy, layer: Weighed, threshold: Float[Tensor, " b"] | None) -> Plan:
    batch, heads, _ = layer.tokens.valid.shape
    prompt = layer.tokens.prompt[:, 0, 0]
    if layer.recovered is None or layer.kept is None or threshold is None:
        choice = torch.zeros(batch, heads, dtype=torch.long, device=prompt.device)
        return Plan(policy.rungs, choice, None, prompt)
    choice = _cheapest(layer.recovered, layer.kept, threshold).indices
    return Plan(policy.rungs, choice, layer.recovered.clamp(max=1), prompt, threshold)


def _cheapest(
    recovered: Float[Tensor, "rungs b h"], kept: Int[Tensor, "rungs b h"], threshold: Float[Tensor, " b"]
) -> torch.return_types.min:
    """Tokens and index of the rung that keeps the least of those that retain enough."""
    enough = recovered >= threshold[:, None]
    return kept.masked_fill(~enough, torch.iinfo(kept.dtype).max).min(dim=0)


def _threshold(selection: Selection, layers: Sequence[Weighed]) -> Float[Tensor, " b"]:
    """Mass that is enough in each sequence: as asked for, or the most that the budget allows."""
    tokens = layers[0].tokens
    if selection.keep is None:
        # Nothing less than full recovers everything, whatever a sum of floats says.
        enough = torch.inf if selection.recovery is not None and selection.recovery >= 1 else selection.threshold
        return torch.full((len(tokens.prompt),), enough, device=tokens.prompt.device)
    recovered = torch.cat([layer.recovered for layer in layers if layer.recovered is not None], dim=-1)
    kept = torch.cat([layer.kept for layer in layers if layer.kept is not None], dim=-1)
    budget = quota_tokens(selection.keep, tokens.prompt)[:, 0, 0] * recovered.shape[-1]
    # What is kept grows with the threshold, and changes only where a rung stops being enough.
    candidates = torch.cat([recovered.transpose(0, 1).flatten(1), recovered.new_zeros(recovered.shape[1], 1)], dim=1)
    candidates = candidates.sort(dim=1).values
    low = torch.zeros_like(budget)
    high = torch.full_like(budget, candidates.shape[1])
    while bool((high - low > 1).any()):
        middle = (low + high) // 2
        at = candidates.gather(1, middle.clamp(max=candidates.shape[1] - 1)[:, None])[:, 0]
        fits = _cheapest(recovered, kept, at).values.sum(dim=-1) <= budget
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    return candidates.gather(1, low[:, None])[:, 0]


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
