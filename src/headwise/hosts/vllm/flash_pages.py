"""Flash pages: vLLM's cache of a layer as FlashAttention reads it on GPUs -> pages of one KV head each.

A head may lie inside a block, `[size, h, d]`, so that its page is no whole piece of memory. It is one all the same for
a kernel that takes strides: pages of all numbers overlap, and only those are named that begin where a head does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from headwise.errors import UnsupportedModelError
from headwise.hosts.vllm.micro_pages import MicroPages
from headwise.types import Float, Int, Tensor


@dataclass(frozen=True)
class FlashPages(MicroPages):
    """A layer's cache.

    Attributes:
        keys, values: of all blocks, however they lie in memory; rows themselves are in one piece.
        kernel: `flash_attn_varlen_func`, with what it is always told: the scale, the soft cap, its version.
    """

    keys: Float[Tensor, "blocks size h d"]
    values: Float[Tensor, "blocks size h d"]
    kernel: Callable[..., Any]

    @classmethod
    def of_cache(cls, kv_cache: Tensor, dim: int, kernel: Callable[..., Any]) -> FlashPages:
        """Of what vLLM hands to a layer: `[blocks, h, size, 2 d]`, and in older releases `[2, blocks, size, h, d]`.

        Raises:
            UnsupportedModelError: for another shape.
        """
        if kv_cache.ndim == 5 and kv_cache.shape[0] == 2 and kv_cache.shape[4] == dim:
            return cls(kv_cache[0], kv_cache[1], kernel)
        if kv_cache.ndim == 4 and kv_cache.shape[3] == 2 * dim:
            keys, values = kv_cache.transpose(1, 2).split(dim, dim=-1)
            return cls(keys, values, kernel)
        raise UnsupportedModelError(f"how vLLM lays out rows in {tuple(kv_cache.shape)} is not known")

    def views(self) -> tuple[Tensor, Tensor]:
        """Keys and values as the kernel takes them, `[pages, size, 1, d]`; numbers are those of `_numbers`."""
        return self._overlapping(self.keys), self._overlapping(self.values)

    def read(self, blocks: Int[Tensor, " n"]) -> tuple[Float[Tensor, "h t d"], Float[Tensor, "h t d"]]:
        """Copies of the keys and values of every row in some blocks, in order."""
        at = blocks.long().to(self.keys.device)
        keys, values = (rows[at].flatten(0, 1).transpose(0, 1) for rows in (self.keys, self.values))
        return keys, values

    def write(self, pages: Int[Tensor, " n"], keys: Float[Tensor, "rows d"], values: Float[Tensor, "rows d"]) -> None:
        """Fill those pages, which belong to one head, from the first on."""
        _, size, heads, _ = self.keys.shape
        at = pages.long().to(self.keys.device)
        for held, rows in ((self.keys, keys), (self.values, values)):
            held.transpose(1, 2)[at // heads, at % heads] = rows.unflatten(0, (-1, size))

    def attend(
        self,
        query: Float[Tensor, "rows g d"],
        table: Int[Tensor, "sequences width"],
        lengths: Int[Tensor, " sequences"],
        starts: Int[Tensor, " sequences_and_one"],
        sinks: Float[Tensor, " g"] | None,
    ) -> Float[Tensor, "rows g d"]:
        """By FlashAttention's kernel for paged rows."""
        (keys, values), found, device = self.views(), torch.empty_like(query), query.device
        self.kernel(
            q=query,
            k=keys,
            v=values,
            out=found,
            cu_seqlens_q=starts.to(device),
            max_seqlen_q=int(starts.diff().max()),
            seqused_k=lengths.to(device),
            max_seqlen_k=int(lengths.max()),
            causal=True,
            block_table=self._numbers(table.to(device)),
            s_aux=sinks,
        )
        return found

    def _numbers(self, pages: Int[Tensor, "sequences width"]) -> Int[Tensor, "sequences width"]:
        """Where pages begin, in units of what two of them can be apart."""
        heads, unit = self.keys.shape[2], self._unit
        block, head = self.keys.stride(0) // unit, self.keys.stride(2) // unit
        return (pages // heads * block + pages % heads * head).int().contiguous()

    @property
    def _unit(self) -> int:
        # Of a single head the stride says nothing, and may be anything.
        return math.gcd(self.keys.stride(0), self.keys.stride(2) if self.keys.shape[2] > 1 else 0)

    def _overlapping(self, rows: Tensor) -> Float[Tensor, "pages size 1 d"]:
        blocks, size, heads, dim = rows.shape
        last = (blocks - 1) * rows.stride(0) + (heads - 1) * rows.stride(2)
        shape, strides = (last // self._unit + 1, size, 1, dim), (self._unit, rows.stride(1), dim, 1)
        return rows.as_strided(shape, strides, rows.storage_offset())


def check_kernel(kernel: Callable[..., Any], dtype: torch.dtype, device: torch.device, dim: int, size: int) -> None:
    """Refuse a kernel that does not read overlapping pages right, by trying it.

    Raises:
        UnsupportedModelError: saying how far it is off.
    """
    heads, group, blocks, length = 2, 2, 5, 2 * size + 3
    kv_cache = torch.randn(blocks, size, heads, 2 * dim, dtype=torch.float32, device=device).to(dtype).transpose(1, 2)
    pages, order = FlashPages.of_cache(kv_cache, dim, kernel), torch.tensor([3, 0, 4], dtype=torch.int32, device="cpu")
    table = order[None] * heads + torch.arange(heads, dtype=torch.int32, device="cpu")[:, None]
    lengths = torch.full((heads,), length, dtype=torch.int32, device="cpu")
    keys, values = (rows[:, None, :length].float() for rows in pages.read(order))
    offs = []
    for asked in (1, 3):
        query = torch.randn(heads, group, asked, dim, dtype=torch.float32, device=device).to(dtype)
        starts = torch.arange(heads + 1, dtype=torch.int32, device="cpu") * asked
        found = pages.attend(query.transpose(1, 2).flatten(0, 1), table, lengths, starts, None)
        later = torch.ones(asked, length, dtype=torch.bool, device=device).triu(length - asked + 1)
        weights = (query.float() @ keys.mT * dim**-0.5).masked_fill(later, -torch.inf).softmax(dim=-1)
        wanted = (weights @ values).transpose(1, 2).flatten(0, 1)
        offs.append(float((found.float() - wanted).abs().max()))
    off = max(offs)
    if not off < (1e-3 if dtype == torch.float32 else 3e-2):
        raise UnsupportedModelError(
            f"FlashAttention of this vLLM does not read pages of single heads: it is off by {off}"
        )
