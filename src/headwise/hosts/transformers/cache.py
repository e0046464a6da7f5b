"""Cache: the contract of transformers -> headwise's layers; pass a `HeadwiseCache` to plain `generate()`."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import CacheLayerMixin

from headwise.errors import HeadwiseWarning, MismatchError
from headwise.hosts.transformers.attachment import attach
from headwise.hosts.transformers.checks import check_model, check_options, doubts, keeps_all
from headwise.hosts.transformers.hybrid_layer import layer_kind
from headwise.hosts.transformers.kinds import KindTable, kind_table
from headwise.hosts.transformers.layer import HeadwiseLayer, held_tensors
from headwise.hosts.transformers.model_facts import read_facts
from headwise.hosts.transformers.parts import CacheParts, OfParts
from headwise.hosts.transformers.passes import check_pass, chunk_doubt, methods_whole
from headwise.hosts.transformers.persistence import Owner, collect, fill, load, refuse_pickling, save
from headwise.hosts.transformers.placeholders import check_marked, check_repeatable
from headwise.hosts.transformers.proof import check_served
from headwise.hosts.transformers.repetition import repeat_prompt
from headwise.hosts.transformers.stock_layers import renew_stock
from headwise.kernels.backends import AUTO, choose
from headwise.policies.base import Policy
from headwise.policies.budget import with_budget
from headwise.policies.words import parse_policy
from headwise.report.report import Report
from headwise.stages.ambient import methods_alone
from headwise.stages.assemble import Assembly, assemble
from headwise.stages.config import LayerConfig
from headwise.stages.layer import LayerCache
from headwise.stages.token_log import TokenLog
from headwise.stages.whole_model import WholeModel
from headwise.steer.spans import Marked
from headwise.steer.steering import BaseSteering
from headwise.types import Int, Tensor


@methods_whole("crop", "reorder_cache", "batch_select_indices", "batch_repeat_interleave", "save", "__deepcopy__")
@methods_alone("begin_pass", "end_pass", "announce", "crop", "reorder_cache", "__deepcopy__")
@methods_alone("batch_select_indices", "batch_repeat_interleave")
class HeadwiseCache(OfParts, Cache):
    """A KV cache that keeps, for every KV head of every sequence, only what its rule names, and frees the rest.

    Pass it to `model.generate(past_key_values=cache, ...)` or to a forward pass. Full-attention layers are
    compressed; sliding-window and linear layers keep transformers' own cache. While a cache of a model lives, the
    model's attention runs through headwise, which for any other cache computes what `sdpa` computes.

    The first pass is the prompt: it is attended to in full, profiled, and compacted layer by layer. The rules found
    then hold for later turns too. With chunked prefill say how long the prompt is (`prompt_tokens`), or the first
    chunk is taken for the whole of it.

    Args:
        model: a causal language model of transformers.
        policy: what to keep, or as words: "auto:ratio=0.25,gate=true+match", as on the command line.
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
        steering: how attention is drawn to what is marked, and in which heads; `mark` says what that is.

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
        policy: Policy | str,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        markers: Sequence[str] = (),
        prompt_tokens: int | None = None,
        page_size: int = 16,
        kernel: str = AUTO,
        evict_every: int = 16,
        budget: int | float | str | None = None,
        cache_dtype: torch.dtype | None = None,
        steering: BaseSteering | None = None,
    ) -> None:
        facts, stock = read_facts(model)
        dtype = cache_dtype or model.dtype
        if isinstance(policy, str):
            policy = parse_policy(policy, budgeted=budget is not None)
        if budget is not None and isinstance(policy, Policy):
            policy = with_budget(policy, budget, facts.compressed_shapes, dtype)
        check_options(policy, tokenizer, prompt_tokens)
        assembly = assemble(
            policy,
            facts,
            choose(kernel, facts.device, dtype, policy.precision),
            page_size=page_size,
            prompt_columns=prompt_tokens,
            evict_every=evict_every,
            dtype=cache_dtype,
            steering=steering,
        )
        check_model(facts, policy, [type(layer).__name__ for layer in stock])
        check_served(model, HeadwiseCache)
        self._build(model, assembly, stock, tokenizer, kind_table(policy.chooser, model, tokenizer, markers))
        for doubt in doubts(self.policy, facts, kernel, self.kernel):
            warnings.warn(doubt, HeadwiseWarning, stacklevel=2)

    def _build(
        self,
        model: PreTrainedModel,
        assembly: Assembly,
        stock: list[CacheLayerMixin],
        tokenizer: PreTrainedTokenizerBase | None,
        kinds: KindTable | None,
    ) -> None:
        """Everything but what is checked of options, which a copy has in common with what it is made of."""
        self.policy, self.kernel, self._assembly = assembly.policy, assembly.kernels.name, assembly
        self.token_log, self.kind_table = TokenLog(self.policy.chooser.reads_kinds, assembly.steering), kinds
        self.model_name, self._model, self._tokenizer = type(model).__name__, weakref.ref(model), tokenizer
        self.passes, self.broken = 0, False
        # Set while a step of it is captured: its bookkeeping is then done between the passes, not in them.
        self.captured = False
        cache = weakref.ref(self)
        layers = [
            layer_kind(layer)(self.make_layer(assembly.layers[index]), layer, cache, self.model_name)
            if index in assembly.layers
            else layer
            for index, layer in enumerate(stock)
        ]
        super().__init__(layers=layers)
        self._parts = CacheParts(self.layers, self.token_log, kinds)
        self.computes_attention, self.asks_all_queries = bool(self._parts.compressed), assembly.asks_all_queries
        self.whole_model = WholeModel(self.policy.chooser, self._parts.cores, weakref.WeakMethod(self._repeat_prompt))
        attach(model, self)

    def make_layer(self, config: LayerConfig) -> LayerCache:
        """What does the work of one layer; training puts layers that watch in its place."""
        return LayerCache(config, self.token_log)

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

    def mark(self, marked: Marked) -> None:
        """Say what is marked in the prompt, or in a further one, before it is read; `encode_marked` finds it.

        Raises:
            InputError: when it was read before.
            ConfigurationError: when the cache was made without steering.
        """
        self.token_log.marks.announce(marked, self.token_log.columns)

    def begin_pass(self, input_ids: Int[Tensor, "b q"] | None) -> None:
        """Called before every forward pass that uses this cache.

        Raises:
            CacheStateError: when the last pass was broken off.
        """
        layers = self.headwise_layers
        if self.captured or self.whole_model.repeating:
            return
        check_pass(self.layers)
        if not layers:
            return
        self._parts.announce(input_ids, layers[0].core.seen)
        # Where a pass was judged only after its end, as drafts are.
        self.whole_model.choose()
        check_repeatable(self, input_ids)
        check_marked(self, input_ids)
        self.whole_model.take_in(input_ids)
        second = self.passes == 1 and not keeps_all(self.policy)
        if second and (doubt := chunk_doubt(layers[0].core, input_ids)) is not None:
            warnings.warn(doubt, HeadwiseWarning, stacklevel=2)
        self.passes += 1

    def end_pass(self) -> None:
        """Called after every such pass that did not fail."""
        if not self.captured and not self.whole_model.repeating:
            self.whole_model.choose()

    def announce(self, input_ids: Int[Tensor, "b q"]) -> None:
        """Take note of tokens that a captured step is going to process; all of them are real."""
        batch, count = input_ids.shape
        self._parts.announce(input_ids, self.token_log.columns)
        self.token_log.extend(batch, count, None, input_ids.device)
        self.passes += 1

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Remove the newest `-tokens_to_remove` tokens from all layers, or from none when one of them cannot.

        Raises:
            InputError: for a positive number, whose meaning changed between releases of transformers.
            CacheStateError: when those tokens have already had an effect that cannot be undone.
        """
        # 5.17 hands over a tensor, which the layers must not share.
        self._parts.crop(int(tokens_to_remove))

    def reset(self) -> None:
        """Forget everything; the cache can then serve another prompt."""
        for layer, fresh in zip(self.layers, read_facts(self.model)[1], strict=True):
            if isinstance(layer, HeadwiseLayer):
                layer.reset()
            else:
                renew_stock(layer, fresh)
        self.passes = 0
        self.whole_model.reset()
        self._parts.truncate()

    def reorder_cache(self, beam_idx: Int[Tensor, " new"]) -> None:
        """Continue the beams at those indices."""
        self._parts.check_select(beam_idx)
        super().reorder_cache(beam_idx)
        self._parts.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences at those indices."""
        self._parts.check_select(indices)
        super().batch_select_indices(indices)
        self._parts.select(indices.nonzero().flatten() if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        indices = self._parts.repeated(repeats)
        self._parts.check_select(indices)
        super().batch_repeat_interleave(repeats)
        self._parts.select(indices)

    def tensors(self) -> list[Tensor]:
        """Every tensor it holds on to, those of stock layers included."""
        return self._parts.token_tensors() + [tensor for layer in self.layers for tensor in held_tensors(layer)]

    def report(self) -> Report:
        """What it holds now, and what a full cache would hold."""
        return self._parts.report(str(self.policy), self.kernel, self.get_seq_length(), self.whole_model.seconds)

    def save(self, path: str | Path) -> None:
        """Write the compressed cache to a safetensors file that `load` reads; an unfinished file is never left.

        Raises:
            CacheStateError: while the prompt is still coming in.
        """
        save(self._parts, self.passes, self._owner, Path(path))

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel, policy: Policy | str, **options: Any) -> HeadwiseCache:
        """A cache as `save` left it, for the same model and policy.

        Args:
            options: as for the constructor.

        Raises:
            MismatchError: when the file was written with another model or policy.
            InputError: when the file is missing or not a saved cache.
        """
        cache = cls(model, policy, **options)
        cache.passes = load(cache._parts, cache._owner, Path(path), read_facts(model)[0].device)
        return cache

    def __deepcopy__(self, memo: dict[int, Any]) -> HeadwiseCache:
        """An independent cache of the same model, as for a prefix that several continuations share."""
        copy = type(self).__new__(type(self))
        kinds = None if self.kind_table is None else self.kind_table.fresh()
        copy._build(self.model, self._assembly, read_facts(self.model)[1], self._tokenizer, kinds)
        copy.passes = fill(copy._parts, *collect(self._parts, self.passes))
        return copy

    __reduce_ex__ = refuse_pickling

    @property
    def _owner(self) -> Owner:
        return Owner(self.model, self.model_name, self.policy, self.kind_table, self._assembly.steering)

    def _repeat_prompt(self, ids: Int[Tensor, "b t"], first: int) -> None:
        assert self._tokenizer is not None
        parts, log = self._parts, self.token_log
        repeat_prompt(self.model, self, parts.cores, parts.states, log, ids, first, self._tokenizer)
