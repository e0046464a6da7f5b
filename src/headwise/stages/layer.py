"""Layer: queries, keys and values of one attention layer, pass by pass -> its attention output.

Runs the stages for one layer: prefill, profile, plan and store for the prompt; decode and evict for what follows.
Knows nothing of transformers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from headwise.errors import CacheStateError
from headwise.kernels.attention import dense_attention
from headwise.less.features import LayerKernels
from headwise.less.state import Memory
from headwise.policies.base import Policy
from headwise.stages.config import Settings
from headwise.stages.decode import decode, received
from headwise.stages.evict import evict
from headwise.stages.plan import Plan
from headwise.stages.prompt import Prompt, compact
from headwise.stages.token_log import Transcript
from headwise.store.rows import Rows
from headwise.store.store import RowStore, add_on_codes
from headwise.types import Bool, Float, Int, LogitOptions, Tensor


@dataclass
class _Pass:
    """Tokens of one forward pass that are attended to but not settled: a part of them may be taken back."""

    query: Float[Tensor, "b h g q d"]
    keys: Float[Tensor, "b h q d"]
    values: Float[Tensor, "b h q e"]
    mask: Bool[Tensor, "b q t"] | None
    options: LogitOptions
    # Mass on the kept rows and on the fresh ones, where a rule ranks by it.
    mass: tuple[Float[Tensor, "b h q n"], Float[Tensor, "b h q f"]] | None = None


class LayerCache:
    """The compressed cache of one attention layer.

    Args:
        index: of the layer.
        policy: what each head may keep.
        transcript: shared by the layers of a cache.
        settings: shared by the layers of a cache.
        kernels: of LESS, for what is evicted to be remembered; None for forgetting it.
    """

    def __init__(
        self,
        index: int,
        policy: Policy,
        transcript: Transcript,
        settings: Settings,
        kernels: LayerKernels | None = None,
    ) -> None:
        self.index = index
        self.policy = policy
        self.transcript = transcript
        self.settings = settings
        self.memory = Memory(kernels)
        self.recording = False
        # Columns of the prompt that the model is repeating, while it does.
        self.repeated: slice | None = None
        self._device = torch.device("cpu")
        # Bytes of a key and its value, what a full cache holds per token and head.
        self.row_bytes = 0
        self.reset()

    def reset(self) -> None:
        """Forget everything, ready for another prompt."""
        self.seen = 0
        self.prompt = Prompt(self.index, self.policy, self.transcript, self.settings, self.memory)
        self.memory.reset()
        self.plan: Plan | None = None
        self.store: RowStore | None = None
        # Columns seen when the rules were last applied.
        self._evicted_at = 0
        self._unsettled: _Pass | None = None
        # Column of the new token, where the step is captured and replayed.
        self._captured: Int[Tensor, " 1"] | None = None

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
            InputError: when the policy needs the kinds of tokens and has not been given them.
        """
        if self._captured is not None:
            return self._attend_captured(query, keys, values, options, self._captured)
        if self.repeated is not None:
            return self.prompt.repeat(query, keys, values, mask, options, self.repeated)
        if self._unsettled is not None:
            self._settle(0)
        batch, _, count, _ = keys.shape
        self._device = keys.device
        self.row_bytes = (keys.shape[-1] + values.shape[-1]) * keys.element_size()
        if self.transcript.columns == self.seen:
            real = None if mask is None else mask.diagonal(self.seen, -2, -1)
            self.transcript.extend(batch, count, real, keys.device)
        self.seen += count
        keys, values = keys.detach(), values.detach()
        current = _Pass(query.detach(), keys, values, mask, options)
        if self.store is None or self.plan is None:
            keys, values = self.prompt.with_earlier(keys, values)
            output = dense_attention(query, keys, values, mask, options)
        else:
            scored, kernels = self.plan.scored, self.settings.kernels
            keys, values = self.store.stored(keys, values)
            current.keys, current.values = keys, values
            decoded = decode(query, self.store, keys, values, mask, options, with_mass=scored, kernels=kernels)
            output = self.memory.merge(query, decoded.output.to(query.dtype), decoded.lse)
            if decoded.on_kept is not None and decoded.on_fresh is not None:
                current.mass = decoded.on_kept, decoded.on_fresh
            # The mask is shared by all layers and needed no more.
            current.mask = None
        self._unsettled = current
        if not self.recording:
            self._settle(0)
        return output

    def take(self, plan: Plan, store: RowStore) -> None:
        """Go on with what was chosen from the prompt."""
        self.plan, self.store = plan, store
        self._evicted_at = self.seen

    def begin_capture(self, column: Int[Tensor, " 1"], room: int) -> None:
        """From now on every pass is one token, and its work the same operations on the same memory.

        Args:
            column: of the new token; on the device, because it differs from step to step.
            room: tokens until `end_capture`.

        Raises:
            CacheStateError: before the whole prompt is in.
        """
        self.settle()
        if self.store is None:
            raise CacheStateError("a step can be captured once the prompt is in")
        self.store.reserve(room)
        self.store.freeze(True)
        # What is folded in between two replays must be read by the next.
        self.memory.allocate(self.store.lengths.shape, self.store.value_dim, self.store.device)
        self._captured = column

    def end_capture(self) -> None:
        """Back to passes of any kind."""
        self._captured = None
        if self.store is not None:
            self.store.freeze(False)

    def advance(self, spare: int) -> None:
        """Take note that a captured step was replayed, and apply the rules where that is due.

        Args:
            spare: tokens until `end_capture`.
        """
        assert self.store is not None and self.plan is not None
        self.seen += 1
        self.store.count(1)
        if self.plan.evicts and self.seen - self._evicted_at >= self.settings.evict_every:
            self._evict(None, spare)

    def take_back(self, count: int) -> None:
        """Remove the newest tokens.

        While recording, any number of those of the last pass; otherwise only as long as nothing was evicted.

        Raises:
            CacheStateError: when the state without those tokens is no longer known.
        """
        self.check_take_back(count)
        if self._unsettled is not None:
            self._settle(count)
        elif count:
            self.seen -= count
            if self.store is not None:
                keep = self.store.occupied() & (self.store.kept_columns() < self.seen)
                self.store.drop(keep)

    def check_take_back(self, count: int) -> None:
        """Refuse what `take_back` would refuse, and change nothing.

        Raises:
            CacheStateError: when the state without those tokens is no longer known.
        """
        if self._unsettled is not None:
            if count > self._unsettled.keys.shape[2]:
                raise CacheStateError(
                    f"cannot remove {count} tokens: only the {self._unsettled.keys.shape[2]} of the last pass can go"
                )
            return
        if count == 0:
            return
        if count > self.seen:
            raise CacheStateError(f"cannot remove {count} tokens from a cache that has seen {self.seen}")
        if self.prompt.begun:
            raise CacheStateError("cannot remove tokens while the prompt is still coming in")
        beyond = self.plan is not None and self.plan.settled and self.seen - count < self._evicted_at
        if beyond or not self.restorable:
            raise CacheStateError(
                f"cannot remove {count} tokens: rules have evicted or ranked tokens with them in view, and what is "
                "evicted does not return; reset() the cache and start again"
            )

    @property
    def restorable(self) -> bool:
        """Whether `take_back` restores the exact state: true until a prompt comes in parts, a rule evicts or ranks."""
        return not self.prompt.begun and (self.plan is None or not (self.plan.evicts or self.plan.scored))

    def settle(self) -> None:
        """Accept every token of the last pass."""
        if self._unsettled is not None:
            self._settle(0)

    def select(self, indices: Int[Tensor, " new"]) -> None:
        """Keep the sequences at `indices`, in that order; one may be taken several times.

        Raises:
            CacheStateError: while the prompt is still coming in.
        """
        self.settle()
        if self.prompt.begun:
            raise CacheStateError("cannot select sequences while the prompt is still coming in")
        if self.store is not None and self.plan is not None:
            self.store.select(indices)
            self.plan.select(indices)
            self.memory.select(indices)

    def to(self, device: torch.device) -> None:
        """Move what is stored to another device."""
        if self.store is not None:
            self.store.to(device)
        self.memory.to(device)

    @property
    def kept_tokens(self) -> Int[Tensor, "b h"] | None:
        """Stored rows of every head; None before the first pass."""
        waiting = 0 if self._unsettled is None else self._unsettled.keys.shape[2]
        if self.store is not None:
            return self.store.lengths + waiting
        held = self._waiting()
        if not held:
            return None
        return torch.full(held[0].shape[:2], self.seen, dtype=torch.long, device=held[0].device)

    @property
    def used_bytes(self) -> int:
        """Bytes of the rows it keeps, and of what it remembers of the others."""
        rows = 0 if self.store is None else self.store.used_bytes
        return rows + self.memory_bytes + sum(t.nbytes for t in self._waiting())

    @property
    def memory_bytes(self) -> int:
        """Bytes of what it remembers of evicted rows."""
        return sum(tensor.nbytes for tensor in self.memory.state().values())

    def tensors(self) -> list[Tensor]:
        """Every tensor it holds on to."""
        held = [*self._waiting(), *self.memory.state().values()]
        if self.store is not None:
            held += self.store.tensors()
        if self.plan is not None:
            held += [self.plan.choice, self.plan.prompt]
            held += [t for t in (self.plan.recovered, self.plan.threshold) if t is not None]
        return held

    def state(self) -> dict[str, Tensor]:
        """Everything that `restore` needs, without page slack; empty before the first pass. Call `settle` first.

        Raises:
            CacheStateError: when the prompt is still coming in.
        """
        if self.prompt.begun:
            raise CacheStateError("cannot save before the whole prompt is in")
        if self.store is None or self.plan is None:
            return {}
        state = {
            "choice": self.plan.choice,
            "prompt": self.plan.prompt,
            "counters": torch.tensor([self.seen, self._evicted_at, self.prompt.rows_read]),
        }
        optional = {"recovered": self.plan.recovered, "threshold": self.plan.threshold}
        state |= {name: tensor for name, tensor in optional.items() if tensor is not None}
        return state | self.store.state() | self.memory.state()

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` gave, into an empty layer."""
        keys, values = state["keys"], state["values"]
        self.seen, self._evicted_at, self.prompt.rows_read = state["counters"].tolist()
        self._device = keys.device
        self.row_bytes = (keys.shape[-1] + values.shape[-1]) * keys.element_size()
        self.memory.restore(state)
        self.plan = Plan(
            self.policy.rungs, state["choice"], state.get("recovered"), state["prompt"], state.get("threshold")
        )
        settings = self.settings
        self.store = RowStore.restore(state, page_size=settings.page_size, precision=settings.precision)

    def _waiting(self) -> list[Tensor]:
        last = self._unsettled
        held = [] if last is None else [last.keys, last.values, last.query, *(last.mass or ())]
        return held + self.prompt.tensors()

    def _settle(self, removed: int) -> None:
        """Accept the tokens of the last pass but for the newest `removed`."""
        last, self._unsettled = self._unsettled, None
        assert last is not None
        kept = last.keys.shape[2] - removed
        self.seen -= removed
        if removed:
            last.query = last.query[:, :, :, :kept]
            last.keys, last.values = last.keys[:, :, :kept], last.values[:, :, :kept]
        if self.store is None or self.plan is None:
            mask = None if last.mask is None else last.mask[:, :kept, : self.seen]
            self.prompt.add(last.query, last.keys, last.values, mask, last.options, self.seen)
            if self.prompt.complete and not self.policy.deferred:
                self.take(*next(compact(self.policy, [self.prompt])))
        else:
            self._settle_step(last, kept)

    def _settle_step(self, last: _Pass, kept: int) -> None:
        assert self.store is not None and self.plan is not None
        newest = torch.arange(self.seen - kept, self.seen, dtype=torch.int32, device=last.keys.device)
        real = self.transcript.real_at(newest)
        increments = scores = None
        if self.plan.scored:
            assert last.mass is not None
            increments = received(last.mass[0][:, :, :kept], real)
            scores = received(last.mass[1][:, :, :kept, :kept], real)
        every = self.settings.evict_every
        due = self.plan.evicts and self.seen - self._evicted_at >= every
        if not due or kept < every:
            self.store.append(last.keys, last.values, newest, real, scores, increments, self.settings.kernels)
            if due:
                self._evict(None, every)
            return
        # As many rows as that are looked at first, and only those that stay are taken in.
        if increments is not None:
            self.store.add_scores(increments)
        heads = last.keys.shape[1]
        columns = newest.expand(len(last.keys), heads, -1)
        written = torch.ones_like(columns, dtype=torch.bool) if real is None else real[:, None].expand(-1, heads, -1)
        self._evict(Rows(last.keys, last.values, columns, scores, written), every)

    def _evict(self, fresh: Rows | None, spare: int) -> None:
        assert self.store is not None and self.plan is not None
        layers = self.settings.layers
        evict(self.plan, self.store, fresh, self.transcript, self.seen, self.index, layers, spare, self.memory)
        self._evicted_at = self.seen

    def _attend_captured(
        self,
        query: Float[Tensor, "b h g 1 d"],
        keys: Float[Tensor, "b h 1 d"],
        values: Float[Tensor, "b h 1 e"],
        options: LogitOptions,
        column: Int[Tensor, " 1"],
    ) -> Float[Tensor, "b h g 1 e"]:
        """One step without any number that the host would have to know: what is kept is real, so there is no mask."""
        assert self.store is not None and self.plan is not None
        kernels = self.settings.kernels
        keys, values = self.store.stored(keys, values)
        pages = [replace(view, longest=view.capacity) for view in self.store.view()]
        decoded = kernels.ragged_decode(query, pages, keys, values, None, options, with_mass=self.plan.scored)
        increments = scores = None
        if decoded.on_kept is not None and decoded.on_fresh is not None:
            increments, scores = received(decoded.on_kept, None), received(decoded.on_fresh, None)
            increments = add_on_codes(pages, increments, kernels)
        kernels.append(pages[0], keys, values, column, None, scores, increments)
        return self.memory.merge(query, decoded.output.to(query.dtype), decoded.lse)
