"""Prompt: keys, values and queries of the prompt, pass by pass -> a plan and a filled store; stages 2 to 4."""

from __future__ import annotations

import time

import torch

from headwise.evict import facts
from headwise.plan import Plan, distinct_widths, make_plan
from headwise.policies.base import Policy
from headwise.profile import Profile, profile, row_weights
from headwise.settings import Settings
from headwise.store import PagedStore, Rows
from headwise.transcript import Transcript
from headwise.types import Bool, Float, Int, LogitOptions, Tensor


class Prompt:
    """What one layer holds of a prompt that has not come to its end.

    Args:
        layer: its index.
        policy: what each head may keep.
        transcript, settings: shared by the layers of a cache.

    Attributes:
        rows_read: query rows that the profile has read.
        profile_seconds: time spent on the profile, and on choosing the rules by it.
        compact_seconds: time spent on copying the kept rows into pages.
    """

    def __init__(self, layer: int, policy: Policy, transcript: Transcript, settings: Settings) -> None:
        self.layer = layer
        self.policy = policy
        self.transcript = transcript
        self.settings = settings
        self.rows_read = 0
        self.profile_seconds = self.compact_seconds = 0.0
        self._profile: Profile | None = None
        self._held: tuple[Tensor, Tensor] | None = None

    @property
    def begun(self) -> bool:
        """Whether a part of the prompt is in, and more is to come."""
        return self._held is not None

    def with_earlier(
        self, keys: Float[Tensor, "b h q d"], values: Float[Tensor, "b h q e"]
    ) -> tuple[Float[Tensor, "b h t d"], Float[Tensor, "b h t e"]]:
        """Keys and values of everything that has come in, and these behind them."""
        if self._held is None:
            return keys, values
        return torch.cat([self._held[0], keys], dim=2), torch.cat([self._held[1], values], dim=2)

    def tensors(self) -> list[Tensor]:
        """Every tensor it holds on to."""
        held = list(self._held or ())
        if self._profile is not None:
            held += [self._profile.score, self._profile.mass, *self._profile.band, self._profile.rows]
        return held

    def add(
        self,
        query: Float[Tensor, "b h g q d"],
        keys: Float[Tensor, "b h q d"],
        values: Float[Tensor, "b h q e"],
        mask: Bool[Tensor, "b q t"] | None,
        options: LogitOptions,
        seen: int,
    ) -> tuple[Plan, PagedStore] | None:
        """Take in the newest of `seen` columns; at the prompt's end choose the rules and fill a store by them."""
        keys, values = self.with_earlier(keys, values)
        if self.policy.selection is not None or "score" in self.policy.facts:
            started = clock(keys.device)
            new = self._read(query, keys, mask, options, seen)
            self._profile = new if self._profile is None else self._profile + new
            self.profile_seconds += clock(keys.device) - started
        expected = self.settings.prompt_columns
        if expected is not None and seen < expected:
            self._held = (keys, values)
            return None
        return self._compact(keys, values)

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

    def _compact(self, keys: Float[Tensor, "b h t d"], values: Float[Tensor, "b h t e"]) -> tuple[Plan, PagedStore]:
        batch, heads, columns, _ = keys.shape
        started = clock(keys.device)
        scores = None if self._profile is None else self._profile.score
        at: Int[Tensor, "b h t"] = torch.arange(columns, device=keys.device).expand(batch, heads, -1)
        everything = torch.ones_like(at, dtype=torch.bool)
        tokens = facts(self.transcript, at, everything, scores, columns, None, self.layer)
        plan = make_plan(self.policy, tokens, self._profile)
        keep = plan.keep(tokens)
        planned = clock(keys.device)
        self.profile_seconds += planned - started
        self._held = self._profile = None
        store = PagedStore.like(keys, values, page_size=self.settings.page_size, scored=plan.scored)
        store.fill(Rows(keys, values, at, scores if plan.scored else None, keep))
        self.compact_seconds += clock(keys.device) - planned
        return plan, store


def clock(device: torch.device) -> float:
    """Seconds, when everything asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
