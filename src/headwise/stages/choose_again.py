"""Choose again: rows that a layer holds, and its newest queries -> which of them stay, by the policy's own choice.

As at the end of the prompt, over rows in place of columns. What it costs depends on what is held, not on what was seen.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from headwise.contract import LayerShape
from headwise.kernels.interface import AttentionMap
from headwise.less.state import EvictedState
from headwise.policies.choice import Choice, PromptSummary
from headwise.policies.evidence import Evidence
from headwise.policies.tokens import Tokens
from headwise.stages.config import LayerConfig
from headwise.stages.newest import NewestQueries
from headwise.stages.plan import Plan, pinned_first
from headwise.stages.repetition import RowFacts, attend_repetition_over_rows
from headwise.stages.row_attention import RowAttention
from headwise.stages.steered import LayerMarks
from headwise.stages.token_log import TokenLog
from headwise.store.rows import Rows
from headwise.store.store import RowStore
from headwise.types import Float, Int, LogitOptions, Tensor


class LaterChoices:
    """What a layer needs to choose among its rows when more tokens have come; nothing where its policy does not.

    Args:
        config: of the layer.
        log: of the tokens, shared by all layers.

    Attributes:
        newest: queries that a choice looks at.
    """

    def __init__(self, config: LayerConfig, log: TokenLog) -> None:
        self._config, self._log, self._again = config, log, config.again
        queries, stride = (0, 1) if self._again is None else (self._again.queries, self._again.stride)
        self.newest = NewestQueries(queries, stride)
        self._marks = LayerMarks(config.steering, log.marks)

    def note(self, query: Float[Tensor, "b h g q d"], columns: Int[Tensor, " q"], options: LogitOptions) -> None:
        """Take in what tokens in those columns asked."""
        if self._again is not None:
            self.newest.put(query, columns, options)

    def repeat(
        self, map: AttentionMap, values: Float[Tensor, "b h q e"], store: RowStore, chunk: slice
    ) -> Float[Tensor, "b h g q e"]:
        """Attend with tokens that repeat a part of what came behind the prompt, and note only what they look at.

        Args:
            map: of these tokens, over their own keys.
            chunk: columns that are repeated.
        """
        rows = store.rows("keys", "values", "columns", "scores", "biases")
        assert rows.scores is not None
        columns = rows.columns.masked_fill(~rows.keep, 0)
        gates, marks = self._marks.evidence(columns)
        facts = RowFacts(self._log.positions(columns), gates, marks)
        output, found = attend_repetition_over_rows(map, values, rows, facts, chunk, self._config.cache.kernels)
        store.replace_scores(rows.scores.maximum(found))
        return output

    def due(self, seen: int, since: int) -> bool:
        """Whether so many columns have come since there was last a choice that it is time for another."""
        return self._again is not None and seen - since >= self._again.interval(since)

    def summary(self, plan: Plan, store: RowStore, seen: int, since: int) -> PromptSummary:
        """What is known of the rows, to choose by; what they remember is brought up to date.

        Args:
            seen: columns that came in; the store has the rows of all.
            since: how many of them there were at the last choice.
        """
        rows, cache = store.rows("columns", "scores"), self._config.cache
        tokens = self._log.facts(
            rows.columns, rows.keep, rows.scores, seen, plan.prompt, self._config.index, cache.layers
        )
        evidence = self._evidence(rows, tokens, seen, since if self._config.remembers else 0, store)
        if self._config.remembers:
            evidence = replace(evidence, remembered=self._predicted(rows, tokens, seen, since, store))
            remembered = self._config.policy.remember(evidence)
            assert remembered is not None
            store.replace_scores(remembered)
            evidence = replace(evidence, remembered=remembered)
        score, loss = self._config.policy.assess_again(evidence)
        return PromptSummary(replace(tokens, score=None), pinned_first(score, tokens), loss)

    def keep(
        self,
        plan: Plan,
        store: RowStore,
        summary: PromptSummary,
        choice: Choice,
        evicted: EvictedState,
        seen: int,
        spare: int,
    ) -> None:
        """Keep the rows that were chosen.

        Args:
            evicted: what the others are folded into.
            seen: columns that came in.
            spare: rows per head that are going to be appended before the next choice.
        """
        keep = plan.keep(replace(summary.tokens, chosen=choice.tokens))
        if evicted.remembers:
            gone = store.gather(summary.tokens.valid & ~keep)
            evicted.fold(gone.keys, gone.values, gone.keep)
        if choice.formats is None:
            store.drop(keep, spare)
        else:
            store.recode(keep, choice.formats, seen, spare)

    def _evidence(self, rows: Rows, tokens: Tokens, seen: int, since: int, store: RowStore) -> Evidence:
        query, columns, there = self.newest.of(seen, since)
        assert self.newest.options is not None
        real, position = self._log.real_at(columns), self._log.positions(columns.expand(len(query), 1, -1))[:, 0]
        gates, marks = self._marks.evidence(rows.columns.masked_fill(~rows.keep, 0))
        kernels, of_columns = self._config.cache.kernels, self._marks.of_columns(seen)
        attention = RowAttention(query, columns, self.newest.options, store, kernels, seen, *of_columns)
        return Evidence(
            query=query,
            read_keys=lambda: store.rows("keys").keys,
            read_values=lambda: store.rows("values").values,
            read_spans=store.spans,
            read_attention=attention.of,
            value_dim=store.value_dim,
            asked=there.expand(len(query), -1) if real is None else real & there,
            query_position=position,
            mask=None,
            options=self.newest.options,
            position=tokens.position,
            real=tokens.valid,
            length=tokens.seen,
            rotation=self._config.rotation,
            repetition_peaks=None,
            gates=gates,
            marks=marks,
            row_bytes=store.row_bytes,
            kv_bytes=LayerShape(1, *store.heads[2:]).token_bytes(store.exact.pools["keys"].dtype),
            stored=store.row_formats(),
        )

    def _predicted(self, rows: Rows, tokens: Tokens, seen: int, since: int, store: RowStore) -> Float[Tensor, "b h n"]:
        """What rows remember; of those that came since, what the gate predicts, which looks at all heads."""
        assert tokens.score is not None
        gate, count = self._config.gate, seen - since
        if gate is None or not count:
            return tokens.score
        fresh = tokens.valid & (rows.columns >= since)
        came = store.gather(fresh, "keys", "columns")
        # In the order of their columns, the same in all heads; what pads heads goes behind.
        at = (came.columns.long() - since).where(came.keep, count)[..., None].expand(came.keys.shape)
        keys = came.keys.new_zeros(*at.shape[:2], count + 1, at.shape[3]).scatter_(2, at, came.keys)[:, :, :count]
        columns = torch.arange(since, seen, device=at.device).expand(len(at), 1, -1)
        scores = gate.scores(keys, self._log.positions(columns)[:, 0], tokens.seen, self._config.rotation)
        return scores.gather(2, (rows.columns.long() - since).clamp(0, count - 1)).where(fresh, tokens.score)
