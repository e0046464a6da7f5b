"""Backend: batches of vLLM on CPUs -> attention over all blocks, or over what was chosen of them, request by request.

A request that is not compressed, and a batch without one that is, is left to vLLM's own backend.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm import envs
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from headwise.hosts.vllm import micro_pages
from headwise.hosts.vllm.choice import Known, choose_rows, mass_of, needs_mass
from headwise.hosts.vllm.manager import HeadwiseSpec
from headwise.hosts.vllm.metrics import count
from headwise.hosts.vllm.model import Model, layer_gate
from headwise.hosts.vllm.rotation import known_rotation
from headwise.hosts.vllm.step import Compacted, Reading, Step, StepMaker, batch_of
from headwise.types import Float, Int, LogitOptions, Tensor


class HeadwiseBackend(CPUAttentionBackend):
    """vLLM's own for CPUs, and compacted requests."""

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Let layers of full attention have blocks that are managed here."""
        spec = super().customize_spec(spec)
        if type(spec) is not FullAttentionSpec or spec.sliding_window or spec.attention_chunk_size:
            return spec
        return HeadwiseSpec(**{field.name: getattr(spec, field.name) for field in fields(spec)})

    @staticmethod
    def get_impl_cls() -> type[HeadwiseImpl]:
        """What attends."""
        return HeadwiseImpl

    @staticmethod
    def get_builder_cls() -> type[HeadwiseBuilder]:
        """What looks at a batch."""
        return HeadwiseBuilder


@dataclass
class HeadwiseMetadata(CPUAttentionMetadata):
    """vLLM's own, of the whole batch, and which part of it is what."""

    step: Step | None = None


class HeadwiseBuilder(CPUAttentionMetadataBuilder):
    """Sorts the requests of a batch."""

    def __init__(self, kv_cache_spec: AttentionSpec, layer_names: list[str], *given: Any, **named: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, *given, **named)
        compacts = isinstance(kv_cache_spec, HeadwiseSpec) and kv_cache_spec.sliding_window is None
        self._steps = None
        if compacts:
            self._steps = StepMaker(layer_names, self.num_kv_heads, self.block_size, Model(self.vllm_config))

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CPUAttentionMetadata:
        """vLLM's own where no request of the batch is compressed."""
        found = super().build(common_prefix_len, common_attn_metadata, fast_build)
        step = None if self._steps is None else self._steps.make(common_attn_metadata)
        if step is None:
            return found
        if step.whole is common_attn_metadata:
            step.own = found
        elif step.whole is not None:
            step.own = super().build(common_prefix_len, step.whole, fast_build)
        return HeadwiseMetadata(**vars(found), step=step)


class HeadwiseImpl(CPUAttentionBackendImpl):
    """Attention of one layer."""

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CPUAttentionMetadata | None,
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
        index = step.layers[layer.layer_name]
        if step.compacted is not None:
            at = step.compacted.tokens
            output[at] = self._attend(layer, index, query[at], kv_cache, step.compacted)
        for reading in step.readings:
            self._read(layer, index, query, kv_cache, reading, output)
        return output

    def _read(self, layer: Any, index: int, query: Tensor, kv_cache: Tensor, reading: Reading, output: Tensor) -> None:
        """Look at what a prompt asks; when it is at its end, choose, and attend with what was written after it."""
        prompt, blocks = reading.prompt, reading.prompt.blocks
        asked = query[reading.asked].view(1, -1, self.num_kv_heads, self.num_queries_per_kv, self.head_size)
        queries, mass, started = asked.permute(0, 2, 3, 1, 4), None, time.perf_counter()
        looks = needs_mass(prompt.options)
        if looks or reading.complete:
            read = micro_pages.read_blocks(kv_cache, reading.filled)
            keys, values = (each[None, :, : prompt.seen] for each in read)
        if looks:
            mass = mass_of(prompt.options, blocks, queries, keys, self._logits())
        held = prompt.observe(index, queries, mass)
        if not reading.complete:
            prompt.seconds += time.perf_counter() - started
            return
        known = Known(prompt.kinds, known_rotation(self.head_size), layer_gate(prompt.options, layer.layer_name))
        rows = choose_rows(prompt.options, blocks, held, keys, values, self._logits(), known)
        pages = prompt.place(index, reading.filled[: blocks.stay], rows)
        for head, (own, chosen) in enumerate(zip(pages, rows, strict=True)):
            micro_pages.write_rows(kv_cache, own, keys[0, head, chosen], values[0, head, chosen], layer.isa)
        prompt.seconds += time.perf_counter() - started
        if index == prompt.layers - 1:
            count("choosing_seconds", prompt.seconds, prompt.options.name)
        if reading.later is not None:
            batch = batch_of([prompt], [reading.blocks], [reading.tokens], [reading.later])
            output[batch.tokens] = self._attend(layer, index, query[batch.tokens], kv_cache, batch)

    def _attend(
        self, layer: Any, index: int, query: Float[Tensor, "n heads d"], kv_cache: Tensor, batch: Compacted
    ) -> Float[Tensor, "n heads d"]:
        """Over the pages of every head, each as if it were a request of its own."""
        heads, group, dim = self.num_kv_heads, self.num_queries_per_kv, self.head_size
        apart = batch.by_head(query.view(-1, heads, group, dim))
        found, table, lengths = torch.empty_like(apart), batch.table[index], batch.lengths[index]
        if self.sinks is None:
            self._attend_paged(layer, apart, kv_cache, table, lengths, batch.starts, found, None)
        for head in range(heads if self.sinks is not None else 0):
            # Sinks are of query heads, and one call has them for as many as a sequence has.
            rows, starts = batch.of_head(head)
            own, sinks = torch.empty_like(apart[rows]), self.sinks[head * group : (head + 1) * group]
            sequences = slice(head, None, heads)
            given = (kv_cache, table[sequences], lengths[sequences], starts, own, sinks)
            self._attend_paged(layer, apart[rows], *given)
            found[rows] = own
        return batch.by_token(found).view(-1, heads * group, dim)

    def _attend_paged(
        self,
        layer: Any,
        query: Float[Tensor, "rows g d"],
        kv_cache: Tensor,
        table: Int[Tensor, "sequences width"],
        lengths: Int[Tensor, " sequences"],
        starts: Int[Tensor, " sequences_and_one"],
        found: Float[Tensor, "rows g d"],
        sinks: Float[Tensor, " g"] | None,
    ) -> None:
        """By vLLM's kernel, with sequences that have one KV head."""
        keys, values = micro_pages.of_cache(kv_cache)
        work = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(lengths),
            num_heads=query.shape[1],
            num_kv_heads=1,
            head_dim=self.head_size,
            seq_lens=lengths.contiguous(),
            dtype=query.dtype,
            query_start_loc=starts,
            causal=True,
            sliding_window_size=-1,
            isa=layer.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            kv_cache_dtype=self.kv_cache_dtype,
        )
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=keys,
            value_cache=values,
            output=found,
            query_start_loc=starts,
            seq_lens=lengths.contiguous(),
            scale=self.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=table.contiguous(),
            softcap=self.logits_soft_cap,
            scheduler_metadata=work,
            s_aux=sinks,
            kv_cache_dtype=self.kv_cache_dtype,
        )

    def _logits(self) -> LogitOptions:
        sinks = None if self.sinks is None else self.sinks.view(self.num_kv_heads, -1)
        return LogitOptions(self.scale, self.logits_soft_cap or None, sinks)
