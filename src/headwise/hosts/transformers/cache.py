"""Cache: the contract of transformers -> headwise's layers; pass a `HeadwiseCache` to plain `generate()`."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Cache, DynamicCache, DynamicLayer, PreTrainedModel, PreTrainedTokenizerBase

from headwise.errors import CacheStateError, MismatchError, UnsupportedModelError
from headwise.gate.checkpoint import gates_of
from headwise.hosts.transformers.attachment import attach
from headwise.hosts.transformers.attention import NAME
from headwise.hosts.transformers.checks import check_options, doubts
from headwise.hosts.transformers.kinds import KindTable
from headwise.hosts.transformers.layer import HeadwiseLayer
from headwise.hosts.transformers.rotation import find_rotation
from headwise.hosts.transformers.whole_model import Together
from headwise.kernels import AUTO, choose
from headwise.policies.base import Policy
from headwise.policies.budget import with_budget
from headwise.policies.full import Full
from headwise.policies.less import load_less
from headwise.report.report import LayerReport, Report
from headwise.stages.config import Settings
from headwise.stages.layer import LayerCache
from headwise.stages.token_log import Transcript
from headwise.types import Int, Kind, Tensor
from headwise.units import storage_bytes


class HeadwiseWarning(UserWarning):
    """Something works, but perhaps not as meant."""


class HeadwiseCache(Cache):
    """A KV cache that keeps, for every KV head of every sequence, only what its rule names, and frees the rest.

    Pass it to `model.generate(past_key_values=cache, ...)` or to a forward pass. Full-attention layers are
    compressed; sliding-window and linear layers keep transformers' own cache. While a cache of a model lives, the
    model's attention runs through headwise, which for any other cache computes what `sdpa` computes.

    The first pass is the prompt: it is attended to in full, profiled, and compacted layer by layer. The rules found
    then hold for later turns too. With chunked prefill say how long the prompt is (`prompt_tokens`), or the first
    chunk is taken for the whole of it.

    Args:
        model: a causal language model of transformers.
        policy: what to keep.
        tokenizer: needed by policies that look at the kind of a token, such as `FastGen`.
        markers: texts such as "[INST]" that count as special tokens.
        prompt_tokens: columns of the prompt, padding included, where it comes in several passes.
        page_size: rows in a page of the store.
        kernel: name of the kernels: "cpu" (compiled), "triton", "reference" (plain torch), or "auto", which takes
            the fastest that run on the model's device; `report()` says which.
        evict_every: new tokens between two evictions. 1 applies the rules after every token, as the papers do; more
            lets a head hold up to so many rows beyond its rule, and costs that much less time.
        budget: room for each sequence, whatever the policy's own parameters say: tokens per KV head (int), a fraction
            of the prompt (float), or bytes of kept rows as text, such as "64MiB". FastGen then finds the recovery
            that fits it. `report()` has what was achieved.
        cache_dtype: of exact rows; None for that of the model. Half precision halves the cache of a model in fp32.

    Raises:
        ConfigurationError: when the policy needs a tokenizer and there is none, an option is out of range, or the
            kernels asked for cannot run on the model's device.
        InputError, MismatchError: when there are no kernels for `Less` or gates for a policy, or they are of another
            model.
        UnsupportedModelError: when no layer of the model can be compressed and the policy is not `Full`, or the
            model does not take attention functions.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: Policy,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        markers: Sequence[str] = (),
        prompt_tokens: int | None = None,
        page_size: int = 16,
        kernel: str = AUTO,
        evict_every: int = 16,
        budget: int | float | str | None = None,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        if budget is not None and isinstance(policy, Policy):
            policy = with_budget(policy, budget, model.config.get_text_config(decoder=True), cache_dtype or model.dtype)
        check_options(policy, tokenizer, page_size, prompt_tokens, evict_every, cache_dtype)
        self._options: dict[str, Any] = {
            "tokenizer": tokenizer,
            "markers": tuple(markers),
            "prompt_tokens": prompt_tokens,
            "page_size": page_size,
            "kernel": kernel,
            "evict_every": evict_every,
            "cache_dtype": cache_dtype,
        }
        self._set_up(model, policy, **self._options)
        for doubt in doubts(self.policy, model, kernel, self.kernel):
            warnings.warn(doubt, HeadwiseWarning, stacklevel=2)

    def _set_up(
        self,
        model: PreTrainedModel,
        policy: Policy,
        *,
        tokenizer: PreTrainedTokenizerBase | None,
        markers: Sequence[str],
        prompt_tokens: int | None,
        page_size: int,
        kernel: str,
        evict_every: int,
        cache_dtype: torch.dtype | None,
    ) -> None:
        """Everything but what is checked and said of options, which a copy has in common with what it is made of."""
        needs_kinds = "kind" in policy.facts
        policy, remembering = load_less(policy, model)
        less = {} if remembering is None else remembering.layers
        self.policy: Policy = policy
        self.transcript = Transcript(needs_kinds)
        self.model_name = type(model).__name__
        self._model = weakref.ref(model)
        self.kind_table = KindTable(tokenizer, markers) if needs_kinds and tokenizer is not None else None
        self.passes = 0
        # Set while a step of it is captured: its bookkeeping is then done between the passes, not in them.
        self.captured = False
        self._together = Together(tokenizer)
        kernels = choose(kernel, model.device, cache_dtype or model.dtype)
        self.kernel = kernels.name
        stock = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
        # The exact type: its subclasses are layers of other kinds, which stay as they are.
        mine = [type(layer) is DynamicLayer for layer in stock]
        if not any(mine) and not isinstance(policy.chooser, Full):
            kinds = ", ".join(sorted({type(layer).__name__ for layer in stock}))
            raise UnsupportedModelError(
                f"{self.model_name} has nothing to compress: all of its {len(stock)} layers are {kinds}; "
                "headwise compresses full-attention layers"
            )
        settings = Settings(
            page_size,
            prompt_tokens,
            kernels,
            evict_every,
            layers=len(stock),
            rotation=find_rotation(model),
            gates=gates_of(policy.chooser, model),
            dtype=cache_dtype,
            precision=policy.precision,
        )
        cache = weakref.ref(self)
        layers = [
            HeadwiseLayer(
                LayerCache(index, policy.chooser, self.transcript, settings, less.get(index)), cache, self.model_name
            )
            if compressed
            else layer
            for index, (layer, compressed) in enumerate(zip(stock, mine, strict=True))
        ]
        super().__init__(layers=layers)
        attach(model, self)

    @property
    def headwise_layers(self) -> list[HeadwiseLayer]:
        """The compressed layers, in the order of the model."""
        return [layer for layer in self.layers if isinstance(layer, HeadwiseLayer)]

    @property
    def awaits_attention(self) -> bool:
        """Whether a layer has new keys that no attention has been computed for."""
        return any(layer.awaits_attention for layer in self.headwise_layers)

    @property
    def model(self) -> PreTrainedModel:
        """The model it was made for.

        Raises:
            MismatchError: when that model is gone.
        """
        model = self._model()
        if model is None:
            raise MismatchError(f"the {self.model_name} this cache was made for is gone")
        return model

    def begin_pass(self, input_ids: Int[Tensor, "b q"] | None) -> None:
        """Called before every forward pass that uses this cache.

        Raises:
            CacheStateError: when the last pass was broken off, or the model's attention was changed.
        """
        layers = self.headwise_layers
        if not layers or self.captured or self._together.repeating:
            return
        seen = layers[0].core.seen
        if self.awaits_attention or any(length != seen for length in self._lengths()):
            raise CacheStateError("the last forward pass was broken off half-way: reset() the cache and start again")
        if self.model.get_decoder().config._attn_implementation != NAME:
            raise CacheStateError(
                f"the model's attention implementation was changed; call model.set_attn_implementation({NAME!r})"
            )
        if self.kind_table is not None:
            if self.kind_table.ids is not None and self.kind_table.ids.shape[1] > seen:
                # Left behind by a pass that failed before its first layer.
                self._truncate()
            self._announce_kinds(self.kind_table, input_ids)
        # Where a pass was judged only after its end, as drafts are.
        self._together.compact(self)
        self._together.take_in(self, input_ids)
        if self._looks_like_a_chunk(input_ids):
            warnings.warn(
                f"the first {seen} tokens were profiled as the whole prompt and more of it seems to follow; with "
                "chunked prefill make the cache with prompt_tokens=input_ids.shape[1]",
                HeadwiseWarning,
                stacklevel=2,
            )
        self.passes += 1

    def end_pass(self) -> None:
        """Called after every such pass that did not fail."""
        if not self.captured and not self._together.repeating:
            self._together.compact(self)

    def announce(self, input_ids: Int[Tensor, "b q"]) -> None:
        """Take note of tokens that a captured step is going to process; all of them are real."""
        if self.kind_table is not None:
            self._announce_kinds(self.kind_table, input_ids)
        batch, count = input_ids.shape
        self.transcript.extend(batch, count, None, input_ids.device)
        self.passes += 1

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Remove the newest `-tokens_to_remove` tokens from all layers, or from none when one of them cannot.

        Raises:
            InputError: for a positive number, whose meaning changed between releases of transformers.
            CacheStateError: when those tokens have already had an effect that cannot be undone.
        """
        # 5.17 hands over a tensor, which the layers must not share.
        tokens_to_remove = int(tokens_to_remove)
        for layer in self.headwise_layers:
            layer.check_crop(tokens_to_remove)
        # Stock layers that refuse do so at once: they come first. Those that have seen nothing may crash.
        for layer in sorted(self.layers, key=lambda layer: isinstance(layer, HeadwiseLayer)):
            if getattr(layer, "is_initialized", True):
                layer.crop(tokens_to_remove)
        self._truncate()

    def reset(self) -> None:
        """Forget everything; the cache can then serve another prompt."""
        super().reset()
        for layer in self.layers:
            if isinstance(layer, DynamicLayer):
                # 5.17 fills the old keys with zeros, and then goes on behind them.
                layer.keys = layer.values = None
                layer.is_initialized = False
        self.passes = 0
        self._together.reset()
        self._truncate()

    def reorder_cache(self, beam_idx: Int[Tensor, " new"]) -> None:
        """Continue the beams at those indices."""
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences at those indices."""
        super().batch_select_indices(indices)
        self._select(indices.nonzero().flatten() if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        batch = next((len(kept) for layer in self.headwise_layers if (kept := layer.core.kept_tokens) is not None), 0)
        super().batch_repeat_interleave(repeats)
        self._select(torch.arange(batch).repeat_interleave(repeats))

    def tensors(self) -> list[Tensor]:
        """Every tensor it holds on to, those of stock layers included."""
        held = self._token_facts()
        for layer in self.layers:
            if isinstance(layer, HeadwiseLayer):
                held += layer.core.tensors()
            else:
                held += [value for value in vars(layer).values() if isinstance(value, Tensor)]
        return held

    def report(self) -> Report:
        """What it holds now, and what a full cache would hold."""
        return Report(
            policy=str(self.policy),
            seen_tokens=self.get_seq_length(),
            layers=[self._report_layer(layer) for layer in self.layers],
            transcript_bytes=storage_bytes(self._token_facts()),
            kernel=self.kernel,
            profile_seconds=self._together.seconds
            + sum((layer.core.prompt.profile_seconds for layer in self.headwise_layers), 0.0),
            compact_seconds=sum((layer.core.prompt.compact_seconds for layer in self.headwise_layers), 0.0),
        )

    def save(self, path: str | Path) -> None:
        """Write the compressed cache to a safetensors file that `load` reads; an unfinished file is never left.

        Raises:
            CacheStateError: while the prompt is still coming in.
        """
        from headwise.hosts.transformers.persistence import save

        save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel, policy: Policy, **options: Any) -> HeadwiseCache:
        """A cache as `save` left it, for the same model and policy.

        Args:
            options: as for the constructor.

        Raises:
            MismatchError: when the file was written with another model or policy.
            InputError: when the file is missing or not a saved cache.
        """
        from headwise.hosts.transformers.persistence import load

        cache = cls(model, policy, **options)
        load(cache, Path(path))
        return cache

    def __deepcopy__(self, memo: dict[int, Any]) -> HeadwiseCache:
        """An independent cache of the same model, as for a prefix that several continuations share."""
        from headwise.hosts.transformers.persistence import collect, fill

        copy = type(self).__new__(type(self))
        copy._options = self._options
        copy._set_up(self.model, self.policy, **self._options)
        fill(copy, *collect(self))
        return copy

    def _announce_kinds(self, table: KindTable, input_ids: Int[Tensor, "b q"] | None) -> None:
        self.transcript.announce(None if input_ids is None else table.kinds(input_ids))
        marked = None if input_ids is None else table.marked(input_ids)
        if marked is not None:
            self.transcript.mark(marked, int(Kind.SPECIAL))

    def _looks_like_a_chunk(self, input_ids: Int[Tensor, "b q"] | None) -> bool:
        core = self.headwise_layers[0].core
        return (
            self.passes == 1
            and core.plan is not None
            and core.settings.prompt_columns is None
            and not core.recording
            and not isinstance(self.policy.chooser, Full)
            and input_ids is not None
            and input_ids.shape[1] > 1
        )

    def _lengths(self) -> list[int]:
        """Columns that each attention layer has seen; layers of other kinds count none."""
        stock = [layer for layer in self.layers if isinstance(layer, DynamicLayer) and layer.is_initialized]
        return [layer.get_seq_length() for layer in [*self.headwise_layers, *stock]]

    def _token_facts(self) -> list[Tensor]:
        """What it knows about tokens beside their rows."""
        ids = None if self.kind_table is None else self.kind_table.ids
        return [*self.transcript.tensors().values(), *([] if ids is None else [ids])]

    def _truncate(self) -> None:
        columns = self.headwise_layers[0].core.seen if self.headwise_layers else 0
        self.transcript.truncate(columns)
        if self.kind_table is not None:
            self.kind_table.truncate(columns)
            newest = self.kind_table.newest()
            if newest is not None:
                self.transcript.correct(newest)

    def _select(self, indices: Int[Tensor, " new"]) -> None:
        self.transcript.select(indices)
        if self.kind_table is not None:
            self.kind_table.select(indices)

    def _report_layer(self, layer: Any) -> LayerReport:
        if not isinstance(layer, HeadwiseLayer):
            return LayerReport.of_stock([value for value in vars(layer).values() if isinstance(value, Tensor)])
        return LayerReport.of(layer.core)


__all__ = ["HeadwiseCache", "HeadwiseWarning"]
