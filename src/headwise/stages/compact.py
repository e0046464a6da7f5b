"""Compact: complete prompts of one layer, or of all -> a plan and a filled store for each; the way from 1/7 to 4/7.

A layer is compacted as soon as its prompt is in, unless the policy decides over all layers at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from headwise.kernels.interface import AttentionMap
from headwise.less.state import EvictedState
from headwise.policies.base import Policy
from headwise.policies.choice import FormatLoss, PromptSummary
from headwise.stages.choose_again import LaterChoices
from headwise.stages.config import LayerConfig
from headwise.stages.decode import Pass
from headwise.stages.match import match_rows
from headwise.stages.plan import Plan, Planned, make_plans, summarise
from headwise.stages.prefill import PromptRows
from headwise.stages.profile import Observations
from headwise.stages.steered import LayerMarks
from headwise.stages.token_log import TokenLog
from headwise.store.rows import Rows
from headwise.store.store import RowStore
from headwise.types import Bool, Float, Int, LogitOptions, Tensor
from headwise.units import clock


class Prompt:
    """One layer's prompt on its way: its rows, and what was observed of it.

    Args:
        config: of the layer.
        log: of the tokens, shared by all layers.
        evicted: what the rows that are not kept are folded into.
        later: takes over what later choices need.

    Attributes:
        complete: whether all of it is in, and only the choice of what to keep is missing.
        profile_seconds: time spent on choosing the rules, and on the profile but for what comes with the attention.
        compact_seconds: time spent on copying the kept rows into pages.
    """

    def __init__(self, config: LayerConfig, log: TokenLog, evicted: EvictedState, later: LaterChoices) -> None:
        self._config, self._log, self._evicted, self._later = config, log, evicted, later
        self._marks = LayerMarks(config.steering, log.marks)
        self.rows, self.observations = PromptRows(), Observations(config, log)
        self.profile_seconds = self.compact_seconds = 0.0
        self.complete = False
        # What rows are to carry to later choices, from when that is known until they are there.
        self._remembered: Float[Tensor, "b h t"] | None = None

    def tensors(self) -> list[Tensor]:
        """Every tensor it holds on to."""
        return self.rows.tensors() + self.observations.tensors()

    def attend(
        self,
        current: Pass,
        query: Float[Tensor, "b h g q d"],
        mask: Bool[Tensor, "b q t"] | None,
        options: LogitOptions,
        *,
        alone: bool,
    ) -> Float[Tensor, "b h g q e"]:
        """Attention of new columns over all that have come in and themselves; nothing is taken in yet.

        What they give every column is noted in the pass, where it is looked at and comes with the attention.

        Args:
            alone: whether no further layer reads these rows.
        """
        keys, values = self.rows.with_earlier(current.keys, current.values)
        # Under autocast, parts of a prompt may come in types of their own.
        map = AttentionMap(query.to(keys.dtype), keys, mask, options)
        attended, mass = self._marks.attended(map), self.observations.mass
        if alone and mass.looked_at and attended is self._marks.profiled(map):
            output, current.profiled = mass.attend(attended, values)
        else:
            output = self._config.cache.kernels.attention(attended, values)
        return output.to(query.dtype)

    def add(self, current: Pass, mask: Bool[Tensor, "b q t"] | None) -> None:
        """Take in the newest columns."""
        self.rows.add(current.keys, current.values)
        keys, _ = self.rows.rows
        started = clock(keys.device)
        map = self._marks.profiled(AttentionMap(current.query, keys, mask, current.options))
        self.observations.observe(map, current.profiled)
        self.profile_seconds += clock(keys.device) - started
        expected = self._config.cache.prompt_columns
        self.complete = expected is None or keys.shape[2] >= expected

    def repeat(
        self,
        query: Float[Tensor, "b h g q d"],
        keys: Float[Tensor, "b h q d"],
        values: Float[Tensor, "b h q e"],
        mask: Bool[Tensor, "b q all"] | None,
        options: LogitOptions,
        chunk: slice,
    ) -> Float[Tensor, "b h g q e"]:
        """Attend with tokens that repeat a part of the complete prompt; nothing of them stays but what they look at."""
        prompt = self.rows.rows[0].shape[2]
        if self._log.real_at(torch.arange(prompt, device=keys.device)) is None:
            # Without padding it says nothing but that the repetition is causal, which is faster without it.
            mask = None
        keys, values = self.rows.with_earlier(keys, values)
        map = self._marks.profiled(AttentionMap(query, keys, mask, options))
        return self.observations.repeat(map, values, prompt, chunk)

    def summary(self) -> PromptSummary:
        """What there is to choose by, once the prompt is complete."""
        keys, values = self.rows.rows
        policy, started = self._config.policy, clock(keys.device)
        at: Int[Tensor, "b h t"] = torch.arange(keys.shape[2], device=keys.device).expand(*keys.shape[:2], -1)
        mass = self.observations.mass.profile
        scores, everything = None if mass is None else mass.score, torch.ones_like(at, dtype=torch.bool)
        layers = self._config.cache.layers
        tokens = self._log.facts(at, everything, scores, keys.shape[2], None, self._config.index, layers)
        assessed: tuple[Float[Tensor, "b h t"] | None, FormatLoss | None] = None, None
        if policy.needs_evidence:
            evidence = self.observations.evidence(keys, values)
            assessed = policy.assess(evidence)
            self._remembered = policy.remember(evidence) if self._config.remembers else None
        summary = summarise(policy, tokens, mass, assessed)
        self.profile_seconds += clock(keys.device) - started
        return summary

    def fill(self, planned: Planned) -> RowStore:
        """Copy the kept rows into a store, and let go of everything else."""
        keys, values = self.rows.rows
        cache, mass, plan, keep = self._config.cache, self.observations.mass.profile, planned.plan, planned.keep
        started = clock(keys.device)
        columns = torch.arange(keys.shape[2], device=keys.device).expand(*keys.shape[:2], -1)
        if self._evicted.remembers:
            self._evicted.fold(keys, values, ~keep & self._log.real(columns[:, :1]))
        scores = mass.score if plan.scored and mass is not None else None
        if self._config.remembers:
            scores, self._remembered = self._remembered, None
        asked = self.observations.asked
        self._later.newest.begin_behind(columns.shape[2])
        if asked.there:
            self._later.note(asked.query, columns[0, 0, columns.shape[2] - asked.query.shape[3] :], asked.options)
        bearable = self.observations.formats(keys, values)
        targets = None if cache.matching is None else self.observations.targets(keys, values)
        self.rows.held = None
        self.observations.clear()
        self.complete = False
        rows = Rows.of(keys, values, columns, scores, keep)
        store = RowStore(
            rows,
            page_size=cache.page_size,
            scored=scores is not None,
            dtype=cache.dtype,
            precision=cache.precision,
            formats=bearable,
        )
        store.fill(rows, planned.formats)
        if targets is not None and cache.matching is not None:
            real = self.observations.positions(keys)[1]
            marks = self._marks.added(columns[:, :1])[1]
            beside = None if marks is None else marks[:, 0]
            plan.matched = match_rows(store, targets, keys, values, real, cache.matching, beside)
        self.compact_seconds += clock(keys.device) - started
        return store


def compact(policy: Policy, prompts: Sequence[Prompt]) -> Iterator[tuple[Plan, RowStore]]:
    """Choose what every head of those layers keeps, and compact one layer after the other.

    Args:
        prompts: complete ones; of one layer, or of all of them where the policy `needs_all_layers`.
    """
    summaries = [prompt.summary() for prompt in prompts]
    device = summaries[0].tokens.valid.device
    started = clock(device)
    plans = make_plans(policy, summaries)
    prompts[0].profile_seconds += clock(device) - started
    for prompt, planned in zip(prompts, plans, strict=True):
        yield planned.plan, prompt.fill(planned)
