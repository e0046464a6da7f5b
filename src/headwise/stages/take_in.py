"""Take in: rows of a pass that was accepted -> the store; what rules evict or a further choice drops goes when due."""

from __future__ import annotations

from functools import lru_cache

import torch

from headwise.policies.choice import Choice, PromptSummary
from headwise.stages.config import LayerConfig
from headwise.stages.decode import Pass, append_pass, fresh_rows
from headwise.stages.evict import evict
from headwise.stages.holdings import Holdings
from headwise.stages.token_log import TokenLog
from headwise.store.rows import Rows
from headwise.types import Int, Tensor


class TakeIn(Holdings):
    """What a layer does with rows once its prompt is in.

    Attributes:
        evicted_at: columns seen when rules were last applied, or tokens last chosen.
    """

    config: LayerConfig
    log: TokenLog
    evicted_at: int

    def take_in(self, last: Pass) -> None:
        """Put the rows of a pass into the store, and let go of what is due."""
        assert self.store is not None
        kept, every = last.keys.shape[2], self.config.cache.evict_every
        newest = _columns(self.seen - kept, self.seen, last.keys.device)
        real, due = self.log.real_at(newest), self._due
        if due and kept >= every:
            # As many rows as that are looked at first, and only those that stay are taken in.
            self._evict(fresh_rows(last, newest, real, self.store), every)
            return
        append_pass(last, newest, real, self.store, self.config.cache.kernels)
        self.later.note(last.query, newest, last.options)
        self.evict_if_due(every)

    def evict_if_due(self, spare: int) -> None:
        """Apply the rules, or choose again, where enough columns have come since that was last done.

        Where the policy decides over all layers, `WholeModel.choose` does it.

        Args:
            spare: rows that are going to be appended before the next time.
        """
        if self._due:
            self._evict(None, spare)
        elif self.choice_is_due and not self.config.policy.needs_all_layers:
            summary = self.summarise_rows()
            self.keep_chosen(summary, self.config.policy.choose_again([summary])[0], spare)

    @property
    def choice_is_due(self) -> bool:
        """Whether enough columns have come since there was last a choice."""
        return self.store is not None and self.later.due(self._taken_in, self.evicted_at)

    def summarise_rows(self) -> PromptSummary:
        """What is known of the rows it holds, to choose by."""
        assert self.plan is not None and self.store is not None
        return self.later.summary(self.plan, self.store, self._taken_in, self.evicted_at)

    def keep_chosen(self, summary: PromptSummary, choice: Choice, spare: int) -> None:
        """Keep what was chosen of them."""
        assert self.plan is not None and self.store is not None
        self.later.keep(self.plan, self.store, summary, choice, self.evicted, self._taken_in, spare)
        self.evicted_at = self._taken_in

    @property
    def _taken_in(self) -> int:
        """Columns whose rows are in the store: all but those of a pass that can still be judged."""
        return self.seen - (0 if self._pending is None else self._pending.keys.shape[2])

    @property
    def _due(self) -> bool:
        assert self.plan is not None
        return self.plan.evicts and self.seen - self.evicted_at >= self.config.cache.evict_every

    def _evict(self, fresh: Rows | None, spare: int) -> None:
        assert self.store is not None and self.plan is not None
        evict(self.config, self.plan, self.store, fresh, self.log, self.seen, spare, self.evicted)
        self.evicted_at = self.seen


@lru_cache(maxsize=8)
def _columns(start: int, end: int, device: torch.device) -> Int[Tensor, " q"]:
    """The columns of a pass, which are the same in all its layers."""
    return torch.arange(start, end, dtype=torch.int32, device=device)
