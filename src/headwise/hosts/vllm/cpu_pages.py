"""CPU pages: vLLM's cache of a layer on CPUs -> pages of one KV head each.

A block `[h, size, 2 d]` holds h of them: first the keys of a head, transposed to `[d, size]`, then its values
`[size, d]`.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm import envs

from headwise.errors import UnsupportedModelError
from headwise.hosts.vllm.micro_pages import MicroPages
from headwise.types import Float, Int, Tensor


@dataclass(frozen=True)
class CpuPages(MicroPages):
    """A layer's cache.

    Attributes:
        isa: of vLLM's kernels, which lay rows out by it.
        impl: of vLLM's backend: how logits are made.
    """

    kv_cache: Float[Tensor, "blocks h size kv"]
    isa: str
    impl: Any = None

    @property
    def place(self) -> int:
        """Since 0.30 all layers lie in one piece of memory; before that every layer is one."""
        return self.kv_cache.storage_offset() // (self.kv_cache.shape[2] * self.kv_cache.shape[3])

    @property
    def memory(self) -> Hashable:
        """Pages of two layers are alike where they are as large, and as far from the beginning of the same memory."""
        page = self.kv_cache.shape[2] * self.kv_cache.shape[3]
        return (
            self.kv_cache.untyped_storage().data_ptr(),
            self.kv_cache.stride(0),
            self.kv_cache.storage_offset() % page,
        )

    def views(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all pages of all layers, as vLLM's kernels take them: `[pages, 1, size, d]`."""
        size, both = self.kv_cache.shape[2:]
        page = size * both
        first, end = self.kv_cache.storage_offset() % page, self.kv_cache.untyped_storage().nbytes()
        count = (end // self.kv_cache.element_size() - first) // page
        shape, strides = (count, 1, size * 2, both // 2), (page, page, both // 2, 1)
        keys, values = self.kv_cache.as_strided(shape, strides, first).chunk(2, dim=2)
        return keys, values

    def read(self, blocks: Int[Tensor, " n"]) -> tuple[Float[Tensor, "h t d"], Float[Tensor, "h t d"]]:
        """Copies of the keys and values of every row in some blocks, in order."""
        _, heads, size, both = self.kv_cache.shape
        found = self.kv_cache[blocks.long()].view(len(blocks), heads, 2, size * both // 2)
        keys = found[:, :, 0].view(len(blocks), heads, both // 2, size).permute(1, 0, 3, 2)
        values = found[:, :, 1].view(len(blocks), heads, size, both // 2).permute(1, 0, 2, 3)
        return keys.reshape(heads, -1, both // 2), values.reshape(heads, -1, both // 2)

    def write(self, pages: Int[Tensor, " n"], keys: Float[Tensor, "rows d"], values: Float[Tensor, "rows d"]) -> None:
        """Fill those pages, which belong to one head, from the first on."""
        page_keys, page_values = self.views()
        size = self.kv_cache.shape[2]
        slots = ((pages.long()[:, None] + self.place) * size + torch.arange(size, device=pages.device)).flatten()
        rows = keys[:, None].contiguous(), values[:, None].contiguous()
        ops.cpu_attn_reshape_and_cache(*rows, page_keys, page_values, slots, self.isa)

    def attend(
        self,
        query: Float[Tensor, "rows g d"],
        table: Int[Tensor, "sequences width"],
        lengths: Int[Tensor, " sequences"],
        starts: Int[Tensor, " sequences_and_one"],
        sinks: Float[Tensor, " g"] | None,
    ) -> Float[Tensor, "rows g d"]:
        """By vLLM's kernel."""
        keys, values = self.views()
        found, lengths = torch.empty_like(query), lengths.contiguous()
        work = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(lengths),
            num_heads=query.shape[1],
            num_kv_heads=1,
            head_dim=query.shape[2],
            seq_lens=lengths,
            dtype=query.dtype,
            query_start_loc=starts,
            causal=True,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            kv_cache_dtype=self.impl.kv_cache_dtype,
        )
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=keys,
            value_cache=values,
            output=found,
            query_start_loc=starts,
            seq_lens=lengths,
            scale=self.impl.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=table + self.place,
            softcap=self.impl.logits_soft_cap,
            scheduler_metadata=work,
            s_aux=sinks,
            kv_cache_dtype=self.impl.kv_cache_dtype,
        )
        return found


@cache
def check_layout(heads: int, size: int, dim: int, dtype: torch.dtype, isa: str) -> None:
    """Refuse kernels of vLLM that lay rows out otherwise, which differs by processor.

    Raises:
        UnsupportedModelError: naming the kernels.
    """
    scratch = torch.zeros(3, heads, size, 2 * dim, dtype=dtype, device="cpu")
    keys, values = torch.randn(2, 2 * size, heads, dim, dtype=torch.float32, device="cpu").to(dtype)
    page_keys, page_values = scratch.view(3, heads, 2 * size, dim).chunk(2, dim=2)
    slots = torch.arange(size, 3 * size, device="cpu")
    ops.cpu_attn_reshape_and_cache(keys, values, page_keys, page_values, slots, isa)
    found = CpuPages(scratch, isa).read(torch.tensor([1, 2], device="cpu"))
    if not all(torch.equal(own, rows.transpose(0, 1)) for own, rows in zip(found, (keys, values), strict=True)):
        raise UnsupportedModelError(
            f"how vLLM's {isa!r} kernels lay out rows of {dtype} on this processor is not known"
        )
