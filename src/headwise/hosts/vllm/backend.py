"""Backend: batches of vLLM -> attention over all blocks, or over what was chosen of them, request by request.

A request that is not compressed, and a batch without one that is, is left to vLLM's own backend.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from dataclasses import fields
from typing import Any

import torch
from vllm.v1.attention.backend import AttentionImpl, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from headwise.errors import UnsupportedModelError
from headwise.hosts.vllm.choice import Known, choose_rows, mass_of, needs_mass, summary_of
from headwise.hosts.vllm.manager import HeadwiseSpec
from headwise.hosts.vllm.metrics import count
from headwise.hosts.vllm.micro_pages import MicroPages
from headwise.hosts.vllm.model import Model, layer_gate
from headwise.hosts.vllm.rotation import known_rotation
from headwise.hosts.vllm.spread import attend_before, compact
from headwise.hosts.vllm.step import Compacted, Reading, Step, StepMaker, batch_of
from headwise.types import Float, LogitOptions, Tensor


def compacting_spec(spec: AttentionSpec) -> AttentionSpec:
    """That of a layer, whose blocks are managed here where it has full attention."""
    if type(spec) is not FullAttentionSpec or spec.sliding_window or spec.attention_chunk_size:
        return spec
    return HeadwiseSpec(**{field.name: getattr(spec, field.name) for field in fields(spec)})


class CompactingBuilder(AttentionMetadataBuilder):
    """Sorts the requests of a batch; stands before a builder of vLLM."""

    def __init__(self, kv_cache_spec: AttentionSpec, layer_names: list[str], *given: Any, **named: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, *given, **named)
        if isinstance(kv_cache_spec, HeadwiseSpec) and getattr(kv_cache_spec, "page_size_padded", None):
            raise UnsupportedModelError(
                "headwise: blocks of this model are padded to those of its other layers, and cannot be compacted; "
                'start vLLM with VLLM_PLUGINS=""'
            )
        self.compacts = isinstance(kv_cache_spec, HeadwiseSpec) and kv_cache_spec.sliding_window is None
        self._steps = None
        if self.compacts:
            heads, size = kv_cache_spec.num_kv_heads, kv_cache_spec.block_size
            self._steps = StepMaker(layer_names, heads, size, Model(self.vllm_config))

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Any:
        """vLLM's own, which gets a `step` where requests of the batch are compressed."""
        found = super().build(common_prefix_len, common_attn_metadata, fast_build)
        step = None if self._steps is None else self._steps.make(common_attn_metadata)
        if step is None:
            return found
        if step.whole is common_attn_metadata:
            step.own = found
        elif step.whole is not None:
            step.own = super().build(common_prefix_len, step.whole, fast_build)
        found.step = step
        return found


class CompactingImpl(AttentionImpl):
    """Attention of one layer; stands before an implementation of vLLM."""

    @abstractmethod
    def pages(self, layer: Any, kv_cache: Tensor) -> MicroPages:
        """Of the layer."""

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """vLLM's own over whole prompts; over what was chosen for those that were read."""
        step = getattr(attn_metadata, "step", None)
        if step is None:
            given = (layer, query, key, value, kv_cache, attn_metadata, output)
            own: Tensor = super().forward(*given, output_scale, output_block_scale)
            return own
        if step.own is not None:
            at = slice(step.own.num_actual_tokens) if step.whole_tokens is None else step.whole_tokens
            part = output[at] if step.whole_tokens is None else torch.empty_like(query[at])
            super().forward(layer, query[at], key, value, kv_cache, step.own, part)
            if step.whole_tokens is not None:
                output[at] = part
        index, pages = step.layers[layer.layer_name], self.pages(layer, kv_cache)
        if step.compacted is not None:
            at = step.compacted.tokens
            output[at] = self.attend(index, query[at], pages, step.compacted)
        for reading in step.readings:
            self._read(layer, query, pages, step, reading, output)
        return output

    def _read(self, layer: Any, query: Tensor, held: MicroPages, step: Step, reading: Reading, output: Tensor) -> None:
        """Look at what a prompt asks; when it is at its end, choose, and attend with what was written after it."""
        prompt, blocks, index = reading.prompt, reading.prompt.blocks, step.layers[layer.layer_name]
        asked = query[reading.asked].view(1, -1, self.num_kv_heads, self.num_queries_per_kv, self.head_size)
        queries, mass, started = asked.permute(0, 2, 3, 1, 4), None, time.perf_counter()
        # What was chosen before holds, and nothing need be looked at again.
        looks = prompt.before is None and needs_mass(prompt.options)
        if looks or (prompt.before is None and reading.complete):
            keys, values = (each[None, :, : prompt.seen] for each in held.read(reading.filled))
        if looks:
            mass = mass_of(prompt.options, blocks, queries, keys, self._logits())
        seen = prompt.observe(index, queries, mass)
        if not reading.complete:
            prompt.seconds += time.perf_counter() - started
            return
        spreads, gate = prompt.options.spreads, layer_gate(prompt.options, layer.layer_name)
        known = Known(prompt.kinds, known_rotation(self.head_size), gate, *((index, prompt.layers) if spreads else ()))
        if prompt.before is None:
            prompt.summaries[index] = summary_of(prompt.options, blocks, seen, keys, values, self._logits(), known)
        if spreads:
            self._share(index, query, held, step, reading, output)
        else:
            (rows,) = choose_rows(prompt.options, blocks, [prompt.summaries.pop(index)])
            pages = prompt.place(index, reading.filled[: blocks.stay], rows)
            for head, (own, chosen) in enumerate(zip(pages, rows, strict=True)):
                held.write(own, keys[0, head, chosen], values[0, head, chosen])
        prompt.seconds += time.perf_counter() - started
        if reading.later is not None and not spreads:
            batch = batch_of([prompt], [reading.blocks], [reading.tokens], [reading.later])
            output[batch.tokens] = self.attend(index, query[batch.tokens], held, batch)
        if index == prompt.layers - 1:
            count("choosing_seconds", prompt.seconds, prompt.options.name)
            prompt.forget()

    def _share(self, index: int, query: Tensor, held: MicroPages, step: Step, reading: Reading, output: Tensor) -> None:
        """Note a layer of those that share what stays; behind the last of them, compact all."""
        prompt = reading.prompt
        prompt.held[index] = held
        if reading.later is not None:
            asked = query[reading.later].view(-1, self.num_kv_heads, self.num_queries_per_kv, self.head_size)
            keys, values = (each[:, : reading.tokens] for each in held.read(reading.blocks))
            found = attend_before(prompt, index, asked, keys, values, self._logits())
            output[reading.later] = found.view(-1, self.num_heads, self.head_size)
        if len(prompt.held) == prompt.layers:
            compact(prompt, reading.filled, step.chosen)

    def attend(
        self, index: int, query: Float[Tensor, "n heads d"], pages: MicroPages, batch: Compacted
    ) -> Float[Tensor, "n heads d"]:
        """Over the pages of every head, each as if it were a request of its own."""
        heads, group, dim = self.num_kv_heads, self.num_queries_per_kv, self.head_size
        apart = batch.by_head(query.view(-1, heads, group, dim))
        table, lengths = batch.table[index], batch.lengths[index]
        if self.sinks is None:
            found = pages.attend(apart, table, lengths, batch.starts, None)
            return batch.by_token(found).view(-1, heads * group, dim)
        found = torch.empty_like(apart)
        for head in range(heads):
            # Sinks are of query heads, and one call has them for as many as a sequence has.
            rows, starts = batch.of_head(head)
            sequences, sinks = slice(head, None, heads), self.sinks[head * group : (head + 1) * group]
            found[rows] = pages.attend(apart[rows], table[sequences], lengths[sequences], starts, sinks)
        return batch.by_token(found).view(-1, heads * group, dim)

    def _logits(self) -> LogitOptions:
        sinks = None if self.sinks is None else self.sinks.view(self.num_kv_heads, -1)
        return LogitOptions(self.scale, self.logits_soft_cap or None, sinks)
