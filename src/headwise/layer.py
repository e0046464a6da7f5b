"""Layer: queries, keys and values of one attention layer, pass by pass -> its attention output.

Runs the stages for one layer: prefill, profile, plan and store for the prompt; decode and evict for what follows.
Knows nothing of transformers.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from headwise.decode import decode
from headwise.errors import CacheStateError
from headwise.evict import evict, facts
from headwise.plan import Plan, distinct_widths, make_plan
from headwise.policies.base import Policy
from headwise.prefill import dense_attention
from headwise.profile import Profile, profile, row_weights
from headwise.store import PagedStore, Rows
from headwise.transcript import Transcript
from headwise.types import Bool, Float, Int, LogitOptions, Tensor


@dataclass(frozen=True)
class Settings:
    """How a cache works, whatever its policy.

    Attributes:
        page_size: rows in a page.
        prompt_columns: columns of the prompt, where it arrives in several passes; None: the first pass is all.
        kernel: name of the decode kernel.
    """

    page_size: int
    prompt_columns: int | None
    kernel: str


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
    """

    def __init__(self, index: int, policy: Policy, transcript: Transcript, settings: Settings) -> None:
        self.index = index
        self.policy = policy
        self.transcript = transcript
        self.settings = settings
        self.recording = False
        self._device = torch.device("cpu")
        # Bytes of a key and its value, what a full cache holds per token and head.
        self.row_bytes = 0
        self.reset()

    def reset(self) -> None:
        """Forget everything, ready for another prompt."""
        self.seen = 0
        self.profile_seconds = 0.0
        self.rows_read = 0
        self.plan: Plan | None = None
        self.store: PagedStore | None = None
        self._profile: Profile | None = None
        # Keys and values of a prompt that has not come to its end.
        self._prompt: tuple[Tensor, Tensor] | None = None
        self._unsettled: _Pass | None = None

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
            if self._prompt is not None:
                keys, values = (
                    torch.cat([self._prompt[0], keys], dim=2),
                    torch.cat([self._prompt[1], values], dim=2),
                )
            output = dense_attention(query, keys, values, mask, options)
        else:
            scored = self.plan.scored
            attention = decode(
                query, self.store, keys, values, mask, options, with_mass=scored, kernel=self.settings.kernel
            )
            output = attention.output
            # The mask is shared by all layers and needed no more.
            current.mask = None
            if attention.on_kept is not None and attention.on_fresh is not None:
                current.mass = attention.on_kept, attention.on_fresh
        self._unsettled = current
        if not self.recording:
            self._settle(0)
        return output

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
                self.store.commit(keep, self._no_rows(self.store))

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
        if self._prompt is not None:
            raise CacheStateError("cannot remove tokens while the prompt is still coming in")
        if not self.restorable:
            raise CacheStateError(
                f"cannot remove {count} tokens: rules have evicted or ranked tokens with them in view, and what is "
                "evicted does not return; reset() the cache and start again"
            )

    @property
    def restorable(self) -> bool:
        """Whether `take_back` restores the exact state: true until a prompt comes in parts, a rule evicts or ranks."""
        return self._prompt is None and (self.plan is None or not (self.plan.evicts or self.plan.scored))

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
        if self._prompt is not None:
            raise CacheStateError("cannot select sequences while the prompt is still coming in")
        if self.store is not None and self.plan is not None:
            self.store.select(indices)
            self.plan.select(indices)

    def to(self, device: torch.device) -> None:
        """Move what is stored to another device."""
        if self.store is not None:
            self.store.to(device)

    @property
    def kept_tokens(self) -> Int[Tensor, "b h"] | None:
        """Stored rows of every head; None before the first pass."""
        waiting = 0 if self._unsettled is None else self._unsettled.keys.shape[2]
        if self.store is not None:
            return self.store.lengths + waiting
        block = self._unsettled.keys if self._unsettled is not None else None
        held = block if self._prompt is None else self._prompt[0]
        if held is None:
            return None
        count = self.seen
        return torch.full(held.shape[:2], count, dtype=torch.long, device=held.device)

    @property
    def used_bytes(self) -> int:
        """Bytes of the rows it keeps."""
        return (0 if self.store is None else self.store.used_bytes) + sum(t.nbytes for t in self._waiting())

    def tensors(self) -> list[Tensor]:
        """Every tensor it holds on to."""
        held = self._waiting()
        if self.store is not None:
            held += self.store.tensors()
        if self.plan is not None:
            held += [self.plan.choice, self.plan.prompt]
            held += [] if self.plan.recovered is None else [self.plan.recovered]
        return held

    def state(self) -> dict[str, Tensor]:
        """Everything that `restore` needs, without page slack; empty before the first pass. Call `settle` first.

        Raises:
            CacheStateError: when the prompt is still coming in.
        """
        if self._prompt is not None:
            raise CacheStateError("cannot save before the whole prompt is in")
        if self.store is None or self.plan is None:
            return {}
        rows = self.store.rows()
        state = {
            "keys": rows.keys[rows.keep],
            "values": rows.values[rows.keep],
            "columns": rows.columns[rows.keep],
            "lengths": self.store.lengths,
            "choice": self.plan.choice,
            "prompt": self.plan.prompt,
            "counters": torch.tensor([self.seen, self.rows_read]),
        }
        optional = {"scores": None if rows.scores is None else rows.scores[rows.keep], "recovered": self.plan.recovered}
        return state | {name: tensor for name, tensor in optional.items() if tensor is not None}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` gave, into an empty layer."""
        keys, values, lengths = state["keys"], state["values"], state["lengths"]
        self.seen, self.rows_read = state["counters"].tolist()
        self._device = keys.device
        self.row_bytes = (keys.shape[-1] + values.shape[-1]) * keys.element_size()
        self.plan = Plan(self.policy.rungs, state["choice"], state.get("recovered"), state["prompt"])
        self.store = self._new_store(lengths.shape[0], lengths.shape[1], keys, values)
        keep = torch.arange(int(lengths.max()), device=keys.device) < lengths[:, :, None]

        def spread(rows: Tensor) -> Tensor:
            return rows.new_zeros(*keep.shape, *rows.shape[1:]).index_put_((keep,), rows)

        scores = spread(state["scores"]) if self.plan.scored else None
        filling = Rows(spread(keys), spread(values), spread(state["columns"]), scores, keep)
        self.store.commit(self.store.occupied(), filling)

    def _new_store(self, batch: int, heads: int, keys: Tensor, values: Tensor) -> PagedStore:
        assert self.plan is not None
        return PagedStore(
            batch=batch,
            heads=heads,
            key_dim=keys.shape[-1],
            value_dim=values.shape[-1],
            dtype=keys.dtype,
            device=keys.device,
            page_size=self.settings.page_size,
            scored=self.plan.scored,
        )

    def _waiting(self) -> list[Tensor]:
        held = [] if self._prompt is None else list(self._prompt)
        if self._profile is not None:
            held += [self._profile.score, self._profile.mass, *self._profile.band, self._profile.rows]
        if (last := self._unsettled) is not None:
            held += [last.query, last.keys, last.values]
            held += last.mass or ()
        return held

    def _settle(self, removed: int) -> None:
        """Accept the tokens of the last pass but for the newest `removed`."""
        last, self._unsettled = self._unsettled, None
        assert last is not None
        kept = last.keys.shape[2] - removed
        self.seen -= removed
        if self.store is None or self.plan is None:
            self._settle_prompt(last, kept)
        else:
            self._settle_step(last, kept)

    def _settle_step(self, last: _Pass, kept: int) -> None:
        assert self.store is not None and self.plan is not None
        batch, heads = last.keys.shape[:2]
        columns = self._columns(self.seen - kept, self.seen, batch, heads)
        real = self.transcript.real(columns)
        scores = None
        if self.plan.scored:
            assert last.mass is not None
            on_kept, on_fresh = last.mass
            # A padding query attends to nothing that counts.
            counts = real[..., None]
            self.store.add_scores((on_kept[:, :, :kept] * counts).sum(dim=2))
            scores = (on_fresh[:, :, :kept, :kept] * counts).sum(dim=2)
        fresh = Rows(last.keys[:, :, :kept], last.values[:, :, :kept], columns, scores, real)
        evict(self.plan, self.store, fresh, self.transcript, self.seen, self.index)

    def _settle_prompt(self, last: _Pass, kept: int) -> None:
        started = self._clock(last.keys.device)
        keys, values = last.keys[:, :, :kept], last.values[:, :, :kept]
        if self._prompt is not None:
            keys = torch.cat([self._prompt[0], keys], dim=2)
            values = torch.cat([self._prompt[1], values], dim=2)
        if self.policy.selection is not None or "score" in self.policy.facts:
            new = self._profile_pass(last, keys, kept)
            self._profile = new if self._profile is None else self._profile + new
        if self.settings.prompt_columns is None or self.seen >= self.settings.prompt_columns:
            self._compact(keys, values)
        else:
            self._prompt = (keys, values)
        self.profile_seconds += self._clock(last.keys.device) - started

    def _profile_pass(self, last: _Pass, keys: Float[Tensor, "b h t d"], kept: int) -> Profile:
        batch = len(keys)
        columns = self._columns(0, self.seen, batch, 1)
        positions, real = self.transcript.positions(columns)[:, 0], self.transcript.real(columns)[:, 0]
        weights = row_weights(self.policy, positions[:, -kept:], real[:, -kept:], self._prompt_tokens(batch))
        self.rows_read += int(((weights.score > 0) | (weights.recovery > 0)).any(dim=0).sum())
        mask = None if last.mask is None else last.mask[:, :kept, : self.seen]
        widths = distinct_widths(self.policy, self._prompt_tokens(batch))
        return profile(last.query[:, :, :, :kept], keys, mask, last.options, weights, positions, widths)

    def _prompt_tokens(self, batch: int) -> Int[Tensor, " b"]:
        """Real tokens of the prompt; what has not come in yet is taken to hold no padding."""
        seen = self.transcript.real_tokens(batch, self.seen, self._device)
        return seen + max(0, (self.settings.prompt_columns or 0) - self.seen)

    def _compact(self, keys: Float[Tensor, "b h t d"], values: Float[Tensor, "b h t e"]) -> None:
        batch, heads, columns, _ = keys.shape
        scores = None if self._profile is None else self._profile.score
        at = self._columns(0, columns, batch, heads)
        everything = torch.ones_like(at, dtype=torch.bool)
        tokens = facts(self.transcript, at, everything, scores, columns, None, self.index)
        self.plan = make_plan(self.policy, tokens, self._profile)
        self.store = self._new_store(batch, heads, keys, values)
        keep = self.plan.keep(tokens)
        self._prompt = self._profile = None
        scores = scores if self.plan.scored else None
        self.store.commit(self.store.occupied(), Rows(keys, values, at, scores, keep))

    def _columns(self, start: int, stop: int, batch: int, heads: int) -> Int[Tensor, "b h n"]:
        return torch.arange(start, stop, device=self._device).expand(batch, heads, -1)

    @staticmethod
    def _no_rows(store: PagedStore) -> Rows:
        batch, heads = store.lengths.shape
        keys, values = (pool.new_empty(batch, heads, 0, pool.shape[-1]) for pool in (store.keys, store.values))
        nothing = store.lengths.new_empty(batch, heads, 0)
        scores = None if store.scores is None else store.scores.new_empty(batch, heads, 0)
        return Rows(keys, values, nothing, scores, nothing.bool())

    @staticmethod
    def _clock(device: torch.device) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()
