"""Holdings: the parts of a layer's cache -> how much they hold, in rows, bytes and tensors."""

from __future__ import annotations

import torch

from headwise.less.state import EvictedState
from headwise.stages.choose_again import LaterChoices
from headwise.stages.compact import Prompt
from headwise.stages.decode import Pass
from headwise.stages.plan import Plan
from headwise.store.store import RowStore
from headwise.types import Int, Tensor


class Holdings:
    """What one layer has, wherever it is on its way.

    Attributes:
        seen: columns that came in.
        prompt: on its way; what it has taken of time stays there.
        plan, store: None until the prompt is in.
        evicted: what LESS remembers of rows that went.
        later: what choices need that come after the prompt.
    """

    seen: int
    prompt: Prompt
    evicted: EvictedState
    later: LaterChoices
    plan: Plan | None
    store: RowStore | None
    _pending: Pass | None

    @property
    def kept_tokens(self) -> Int[Tensor, "b h"] | None:
        """Stored rows of every head; None before the first pass."""
        pending = 0 if self._pending is None else self._pending.keys.shape[2]
        if self.store is not None:
            return self.store.lengths + pending
        held = self._not_stored()
        if not held:
            return None
        return torch.full(held[0].shape[:2], self.seen, dtype=torch.long, device=held[0].device)

    @property
    def used_bytes(self) -> int:
        """Bytes of the rows it keeps, and of what it remembers of the others."""
        rows = 0 if self.store is None else self.store.used_bytes
        return rows + self.evicted_bytes + sum(tensor.nbytes for tensor in self._not_stored())

    @property
    def evicted_bytes(self) -> int:
        """Bytes of what it remembers of evicted rows."""
        return sum(tensor.nbytes for tensor in self.evicted.state().values())

    def tensors(self) -> list[Tensor]:
        """Every tensor it holds on to."""
        parts = [part.tensors() for part in (self.store, self.plan) if part is not None]
        parts.append(list(self.later.newest.state().values()))
        return [*self._not_stored(), *self.evicted.state().values(), *(tensor for part in parts for tensor in part)]

    @property
    def _held(self) -> tuple[int, ...] | None:
        """Sequences, KV heads, and channels of a key and of a value."""
        if self.store is not None:
            return self.store.heads
        if not self.prompt.rows.begun:
            return None
        keys, values = self.prompt.rows.rows
        return (*keys.shape[:2], keys.shape[-1], values.shape[-1])

    def _not_stored(self) -> list[Tensor]:
        return ([] if self._pending is None else self._pending.tensors()) + self.prompt.tensors()
