"""Layer: queries, keys and values of one attention layer, pass by pass -> its attention output; runs stages 1/7 to 6/7.

Prefill, profile, plan and store for the prompt; decode and evict for what follows. Knows nothing of who runs the model.
"""

from __future__ import annotations

import torch

from headwise.contract import LayerShape
from headwise.errors import CacheStateError, InputError
from headwise.kernels.interface import AttentionMap
from headwise.less.state import EvictedState
from headwise.stages.admit import check_heads, check_mask
from headwise.stages.ambient import methods_alone
from headwise.stages.choose_again import LaterChoices
from headwise.stages.compact import Prompt, compact
from headwise.stages.config import LayerConfig
from headwise.stages.decode import Pass, append_pass, decode_pass
from headwise.stages.plan import Plan
from headwise.stages.steered import LayerMarks
from headwise.stages.take_back import check_last_pass, check_taken_in
from headwise.stages.take_in import TakeIn
from headwise.stages.token_log import TokenLog
from headwise.store.store import RowStore
from headwise.types import Bool, Float, Int, LogitOptions, Tensor


@methods_alone("attend", "attend_again", "take_back", "accept", "select", "to")
class LayerCache(TakeIn):
    """The compressed cache of one attention layer.

    Args:
        config: of the layer.
        log: of the tokens, shared by the layers of a cache.

    Attributes:
        full_row_bytes: bytes of a key and its value, what a full cache holds per token and head.
        repetition_chunk: columns that the model is repeating, while it does.
        captured_column: of the new token, while a step is captured and replayed (`stages/capture.py`).
        readers_left: layers of the model that are still to read, in this pass, what this one keeps.
    """

    def __init__(self, config: LayerConfig, log: TokenLog) -> None:
        self.config, self.log, self._marks = config, log, LayerMarks(config.steering, log.marks)
        self.evicted = EvictedState(config.features)
        self.later = LaterChoices(config, log)
        self.recording = False
        self.full_row_bytes = 0
        self.reset()

    @property
    def index(self) -> int:
        """Of the layer, among all layers of the model."""
        return self.config.index

    def reset(self) -> None:
        """Forget everything, ready for another prompt."""
        self.seen = 0
        self.repetition_chunk: slice | None = None
        self.prompt = Prompt(self.config, self.log, self.evicted, self.later)
        self.evicted.reset()
        self.later.newest.reset()
        self.plan: Plan | None = None
        self.store: RowStore | None = None
        self.evicted_at = 0
        self._pending: Pass | None = None
        self.captured_column: Int[Tensor, " 1"] | None = None
        self.readers_left = 0

    def attend(
        self,
        query: Float[Tensor, "b h g q d"],
        keys: Float[Tensor, "b h q d"],
        values: Float[Tensor, "b h q e"],
        mask: Bool[Tensor, "b q t"] | None,
        options: LogitOptions,
    ) -> Float[Tensor, "b h g q e"]:
        """Attend with new tokens over everything kept and themselves; then let each head's rule evict.

        Args:
            mask: True where a query may see a column, over all columns seen and the new ones; None means causal
                and no padding.

        Raises:
            InputError: when the pass does not go with what is held, or the policy needs the kinds of tokens and has
                not been given them.
            CacheStateError: when nothing was chosen from a prompt that was complete before.
        """
        if self.captured_column is not None and self.store is not None:
            # Nothing here may depend on a number that the host would have to know: what is kept is real.
            step = Pass(query, keys, values, None, options)
            output = self._decode(step)
            append_pass(step, self.captured_column, None, self.store, self.config.cache.kernels)
            self.later.note(query, self.captured_column, options)
            return output
        if self.repetition_chunk is not None:
            return self._repeat(query, keys, values, mask, options)
        if self.prompt.complete:
            raise CacheStateError(
                "the prompt is complete, and what to keep of it was not chosen: where a policy decides over all "
                "layers, a host calls WholeModel.choose() between two passes"
            )
        self._accept()
        batch, _, count, _ = keys.shape
        first = self.log.columns == self.seen
        if first or self.store is None:
            check_heads(keys, values, self._held)
        if self.store is None:
            self.full_row_bytes = LayerShape(1, keys.shape[-1], values.shape[-1]).token_bytes(keys.dtype)
        if first:
            check_mask(mask, self.log)
            real = None if mask is None else mask.diagonal(self.seen, -2, -1)
            try:
                self.log.extend(batch, count, real, keys.device)
            except InputError:
                # Nothing of a pass that is refused stays.
                self.log.truncate(self.seen)
                raise
        self.seen += count
        marks = self._marks.fresh(self.seen - count, self.seen)
        current = Pass(query.detach(), keys.detach(), values.detach(), mask, options, marks)
        if self.store is None:
            alone = self.config.readers == 1
            output = self.prompt.attend(current, query, mask, options, alone=alone)
        else:
            output = self._decode(current)
            # The mask is shared by all layers and needed no more.
            current.mask = None
        self._pending, self.readers_left = current, self.config.readers - 1
        self._accept_if_read()
        return output

    def attend_again(
        self,
        query: Float[Tensor, "b h g q d"],
        keys: Float[Tensor, "b h f d"],
        values: Float[Tensor, "b h f e"],
        mask: Bool[Tensor, "b q t"] | None,
        options: LogitOptions,
    ) -> Float[Tensor, "b h g q e"]:
        """Attend for a further layer that reads what this one keeps, in the same pass, after `attend`.

        Args:
            query: of all new tokens, or of the newest of them.
            keys, values: as `attend` had them.

        Raises:
            CacheStateError: when there was no such pass, or it had all its readers.
        """
        if self.repetition_chunk is not None:
            return self._repeat(query, keys, values, mask, options)
        first = self._pending
        if first is None or not self.readers_left:
            raise CacheStateError(
                f"layer {self.index} is read more often in this pass than it was in the model's trial"
            )
        again = Pass(query.detach(), first.keys, first.values, mask, options, first.marks)
        if self.store is None:
            output = self.prompt.attend(again, query, mask, options, alone=False)
        else:
            output = self._decode(again)
        if self.config.asks_queries:
            first.join(again)
        self.readers_left -= 1
        self._accept_if_read()
        return output

    def _accept_if_read(self) -> None:
        if not (self.recording or self.readers_left):
            self._accept()

    def go_on_with(self, plan: Plan, store: RowStore) -> None:
        """Take over what was chosen from the prompt."""
        self.plan, self.store = plan, store
        self.evicted_at = self.seen

    # Taking back.

    def take_back(self, count: int) -> None:
        """Remove the newest tokens.

        While recording, any number of those of the last pass; otherwise only as long as nothing was evicted.

        Raises:
            CacheStateError: when the state without those tokens is no longer known.
        """
        self.check_take_back(count)
        if self._pending is not None:
            self._accept(but=count)
        elif count:
            self.seen -= count
            if self.store is not None:
                keep = self.store.occupied() & (self.store.kept_columns() < self.seen)
                self.store.forget(count, keep)

    def check_take_back(self, count: int) -> None:
        """Refuse what `take_back` would refuse, and change nothing.

        Raises:
            CacheStateError: when the state without those tokens is no longer known.
        """
        if self._pending is not None:
            check_last_pass(count, self._pending)
        elif count:
            begun = self.prompt.rows.begun
            check_taken_in(count, self.seen, self.evicted_at, begun, self.plan, self.store)

    @property
    def restorable(self) -> bool:
        """Whether `take_back` always restores the exact state.

        True until a prompt comes in parts or a rule evicts or ranks, and never where rows become codes.
        """
        if self.prompt.rows.begun or self.config.cache.precision is not None:
            return False
        return self.plan is None or not (self.plan.evicts or self.plan.scored or self.config.again)

    def accept(self) -> None:
        """Take the tokens of the last pass in for good."""
        self._accept()

    def _accept(self, but: int = 0) -> None:
        """The same where nothing disturbs already; but for so many of the newest."""
        last, self._pending = self._pending, None
        if last is None:
            return
        kept = last.keys.shape[2] - but
        self.seen -= but
        if but:
            last.cut(kept)
        if self.store is not None:
            self.take_in(last)
            return
        mask = None if last.mask is None else last.mask[:, :kept, : self.seen]
        self.prompt.add(last, mask)
        if self.prompt.complete and not self.config.policy.needs_all_layers:
            self.go_on_with(*next(compact(self.config.policy, [self.prompt])))

    # What happens to all that it holds.

    def select(self, indices: Int[Tensor, " new"]) -> None:
        """Keep the sequences at `indices`, in that order; one may be taken several times.

        Raises:
            CacheStateError: while the prompt is still coming in.
        """
        self._accept()
        if self.prompt.rows.begun:
            raise CacheStateError("cannot select sequences while the prompt is still coming in")
        if self.store is not None and self.plan is not None:
            self.store.select(indices)
            self.plan.select(indices)
            self.evicted.select(indices)
            self.later.newest.select(indices)

    def to(self, device: torch.device) -> None:
        """Move what is stored to another device."""
        if self.store is not None:
            self.store.to(device)
        self.evicted.to(device)
        self.later.newest.to(device)

    def _repeat(
        self,
        query: Float[Tensor, "b h g q d"],
        keys: Float[Tensor, "b h q d"],
        values: Float[Tensor, "b h q e"],
        mask: Bool[Tensor, "b q t"] | None,
        options: LogitOptions,
    ) -> Float[Tensor, "b h g q e"]:
        assert self.repetition_chunk is not None
        if self.store is None:
            return self.prompt.repeat(query, keys, values, mask, options, self.repetition_chunk)
        # Without padding a mask says nothing but that the repetition is causal.
        own = None if mask is None or self.log.all_real() is None else mask[:, :, self.seen :]
        return self.later.repeat(AttentionMap(query, keys, own, options), values, self.store, self.repetition_chunk)

    def _decode(self, current: Pass) -> Float[Tensor, "b h g q e"]:
        assert self.store is not None and self.plan is not None
        kernels, marks = self.config.cache.kernels, self._marks
        return decode_pass(current, self.store, self.evicted, with_mass=self.plan.scored, kernels=kernels, marks=marks)
