"""Prompt: keys, values and queries of the prompt, pass by pass -> a plan and a filled store; stages 2 to 4.

A layer is compacted as soon as its prompt is in, unless the policy decides over all layers at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch.nn import functional

from headwise.kernels.attention import causal
from headwise.less.state import Memory
from headwise.policies.base import Policy
from headwise.policies.scored import Evidence, Scored
from headwise.stages.config import Settings
from headwise.stages.evict import facts
from headwise.stages.plan import Plan, Weighed, distinct_widths, make_plans, weigh
from headwise.stages.profile import Profile, profile, row_weights
from headwise.stages.reconstruct import attend_repeating
from headwise.stages.token_log import Transcript
from headwise.store.rows import Rows
from headwise.store.store import RowStore, exact_row_bytes
from headwise.types import Bool, Float, Int, LogitOptions, Tensor
from headwise.units import clock


class Prompt:
    """What one layer holds of a prompt that has not come to its end.

    Args:
        layer: its index.
        policy: what each head may keep.
        transcript, settings: shared by the layers of a cache.
        memory: what the rows that are not kept are folded into.

    Attributes:
        rows_read: query rows that the profile has read.
        complete: whether all of it is in, and only the choice of what to keep is missing.
        reconstruction: largest attention that each column got while the model repeated the prompt.
        profile_seconds: time spent on the profile, and on choosing the rules by it.
        compact_seconds: time spent on copying the kept rows into pages.
    """

    def __init__(self, layer: int, policy: Policy, transcript: Transcript, settings: Settings, memory: Memory) -> None:
        self.layer = layer
        self.policy = policy
        self.transcript = transcript
        self.settings = settings
        self.memory = memory
        self.rows_read = 0
        self.profile_seconds = self.compact_seconds = 0.0
        self.complete = False
        self.reconstruction: Float[Tensor, "b h t"] | None = None
        self.held: tuple[Tensor, Tensor] | None = None
        self._profile: Profile | None = None
        # The newest queries, their mask and the model's options, as far as the policy looks at them.
        self._asked: tuple[Tensor, Tensor | None, LogitOptions] | None = None

    @property
    def begun(self) -> bool:
        """Whether a part of the prompt is in, and more is to come."""
        return self.held is not None

    def with_earlier(
        self, keys: Float[Tensor, "b h q d"], values: Float[Tensor, "b h q e"]
    ) -> tuple[Float[Tensor, "b h t d"], Float[Tensor, "b h t e"]]:
        """Keys and values of everything that has come in, and these behind them."""
        if self.held is None:
            return keys, values
        return torch.cat([self.held[0], keys], dim=2), torch.cat([self.held[1], values], dim=2)

    def tensors(self) -> list[Tensor]:
        """Every tensor it holds on to."""
        held = list(self.held or ())
        if self._profile is not None:
            profile = self._profile
            held += [profile.score, profile.mass, *profile.band, profile.rows, *profile.widths]
        if self._asked is not None:
            held += [tensor for tensor in self._asked[:2] if tensor is not None]
        return held if self.reconstruction is None else [*held, self.reconstruction]

    def add(
        self,
        query: Float[Tensor, "b h g q d"],
        keys: Float[Tensor, "b h q d"],
        values: Float[Tensor, "b h q e"],
        mask: Bool[Tensor, "b q t"] | None,
        options: LogitOptions,
        seen: int,
    ) -> None:
        """Take in the newest of `seen` columns."""
        self.held = keys, values = self.with_earlier(keys, values)
        started = clock(keys.device)
        if self.policy.selection is not None or "score" in self.policy.facts:
            new = self._read(query, keys, mask, options, seen)
            self._profile = new if self._profile is None else self._profile + new
        if isinstance(self.policy, Scored):
            self._remember(query, mask, options, self.policy.query_rows, seen)
        self.profile_seconds += clock(keys.device) - started
        expected = self.settings.prompt_columns
        self.complete = expected is None or seen >= expected

    def repeat(
        self,
        query: Float[Tensor, "b h g q d"],
        keys: Float[Tensor, "b h q d"],
        values: Float[Tensor, "b h q e"],
        mask: Bool[Tensor, "b q all"] | None,
        options: LogitOptions,
        chunk: slice,
    ) -> Float[Tensor, "b h g q e"]:
        """Attend with tokens that repeat a part of the complete prompt, and note only what they look at."""
        assert self.held is not None
        held = self.held[0]
        if self.reconstruction is None:
            self.reconstruction = torch.zeros(held.shape[:3], device=held.device)
        if self.transcript.real_at(torch.arange(held.shape[2], device=held.device)) is None:
            # Without padding it says nothing but that the repetition is causal, which is faster without it.
            mask = None
        everything = self.with_earlier(keys, values)
        output, found = attend_repeating(query, *everything, mask, options, chunk, self.settings.kernels)
        self.reconstruction[:, :, chunk] = self.reconstruction[:, :, chunk].maximum(found)
        return output

    def weigh(self) -> Weighed:
        """What the layer would keep, once its prompt is complete."""
        assert self.held is not None
        keys, values = self.held
        batch, heads, columns, _ = keys.shape
        started = clock(keys.device)
        at: Int[Tensor, "b h t"] = torch.arange(columns, device=keys.device).expand(batch, heads, -1)
        everything = torch.ones_like(at, dtype=torch.bool)
        scores = None if self._profile is None else self._profile.score
        tokens = facts(self.transcript, at, everything, scores, columns, None, self.layer, self.settings.layers)
        worth = damage = None
        if isinstance(self.policy, Scored):
            evidence = self._evidence(keys, values)
            worth, damage = self.policy.score(evidence).float(), self.policy.damage(evidence)
        weighed = replace(weigh(self.policy, tokens, self._profile, worth), damage=damage)
        self.profile_seconds += clock(keys.device) - started
        return weighed

    def fill(self, plan: Plan, keep: Bool[Tensor, "b h t"]) -> RowStore:
        """Copy the kept rows into a store, and let go of everything else."""
        assert self.held is not None
        keys, values = self.held
        started = clock(keys.device)
        if self.memory.remembers:
            columns = torch.arange(keys.shape[2], device=keys.device).expand(len(keys), 1, -1)
            self.memory.fold(keys, values, ~keep & self.transcript.real(columns))
        scores = self._profile.score if plan.scored and self._profile is not None else None
        columns = torch.arange(keys.shape[2], device=keys.device).expand(*keys.shape[:2], -1)
        self.held = self._profile = self._asked = self.reconstruction = None
        self.complete = False
        rows = Rows(keys, values, columns, scores, keep)
        store = RowStore(
            rows,
            page_size=self.settings.page_size,
            scored=plan.scored,
            dtype=self.settings.dtype,
            precision=self.settings.precision,
            formats=plan.formats,
        )
        store.fill(rows)
        self.compact_seconds += clock(keys.device) - started
        return store

    def _remember(
        self,
        query: Float[Tensor, "b h g q d"],
        mask: Bool[Tensor, "b q t"] | None,
        options: LogitOptions,
        rows: int | None,
        seen: int,
    ) -> None:
        """Keep the newest queries until the prompt is complete; all of them where it comes in one pass anyway."""
        if self._asked is not None:
            earlier, hidden, _ = self._asked
            if mask is not None or hidden is not None:
                before = earlier.shape[3]
                hidden = _causal_mask(earlier, seen - query.shape[3]) if hidden is None else hidden
                mask = _causal_mask(query, seen) if mask is None else mask
                mask = torch.cat([functional.pad(hidden, (0, seen - hidden.shape[-1])), mask], dim=1)
                assert mask.shape[1] == before + query.shape[3]
            query = torch.cat([earlier, query], dim=3)
        if self.settings.prompt_columns is not None and rows is not None:
            first = max(0, query.shape[3] - rows)
            query, mask = query[:, :, :, first:], None if mask is None else mask[:, first:]
        self._asked = query, mask, options

    def _evidence(self, keys: Float[Tensor, "b h t d"], values: Float[Tensor, "b h t e"]) -> Evidence:
        assert self._asked is not None
        query, mask, options = self._asked
        columns = torch.arange(keys.shape[2], device=keys.device).expand(len(keys), 1, -1)
        positions, real = self.transcript.positions(columns)[:, 0], self.transcript.real(columns)[:, 0]
        rotation, gate, found = self.settings.rotation, self.settings.gates.get(self.layer), self.reconstruction
        if gate is not None:
            found = gate.scores(keys, positions, real.sum(dim=1)[:, None, None], rotation)
        row_bytes = exact_row_bytes(keys, values, self.settings.dtype)
        return Evidence(query, keys, values, mask, options, positions, real, rotation, found, row_bytes)

    def _read(
        self,
        query: Float[Tensor, "b h g q d"],
        keys: Float[Tensor, "b h t d"],
        mask: Bool[Tensor, "b q t"] | None,
        options: LogitOptions,
        seen: int,
    ) -> Profile:
        batch, count = len(keys), query.shape[3]
        columns = torch.arange(seen, device=keys.device).expand(batch, 1, -1)
        positions, real = self.transcript.positions(columns)[:, 0], self.transcript.real(columns)[:, 0]
        # What has not come in yet is taken to hold no padding.
        prompt = self.transcript.real_tokens(batch, seen, keys.device)
        prompt = prompt + max(0, (self.settings.prompt_columns or 0) - seen)
        weights = row_weights(self.policy, positions[:, -count:], real[:, -count:], prompt)
        self.rows_read += int(((weights.score > 0) | (weights.recovery > 0)).any(dim=0).sum())
        widths = distinct_widths(self.policy, prompt)
        return profile(query, keys, mask, options, weights, positions, widths, self.settings.kernels)


def compact(policy: Policy, prompts: Sequence[Prompt]) -> Iterator[tuple[Plan, RowStore]]:
    """Choose what every head of those layers keeps, and compact one layer after the other.

    Args:
        prompts: complete ones; of one layer, or of all of them where the policy is `deferred`.
    """
    weighed = [prompt.weigh() for prompt in prompts]
    device = weighed[0].tokens.valid.device
    started = clock(device)
    plans = make_plans(policy, weighed)
    prompts[0].profile_seconds += clock(device) - started
    for prompt, (plan, keep) in zip(prompts, plans, strict=True):
        yield plan, prompt.fill(plan, keep)


def _causal_mask(query: Float[Tensor, "b h g q d"], seen: int) -> Bool[Tensor, "b q t"]:
    columns = torch.arange(seen - query.shape[3], seen, device=query.device)
    return causal(columns, seen).expand(len(query), -1, -1)
