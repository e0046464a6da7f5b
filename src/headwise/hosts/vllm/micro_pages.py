"""Micro pages: vLLM's cache of a layer on CPUs -> pages of one KV head each, which are read, written and attended to.

A block `[h, size, 2 d]` of the cache holds h of them: first the keys of a head, transposed to `[d, size]`, then its
values `[size, d]`. Nothing is copied to see it so.
"""

from __future__ import annotations

from functools import cache

import torch
from vllm import _custom_ops as ops

from headwise.errors import UnsupportedModelError
from headwise.types import Float, Int, Tensor


def of_cache(kv_cache: Float[Tensor, "blocks h size kv"]) -> tuple[Tensor, Tensor]:
    """Keys and values of all pages, as vLLM's kernels take them: `[blocks * h, 1, size, d]`.

    The page of a head in a block is `block * h + head`.
    """
    blocks, heads, size, both = kv_cache.shape
    keys, values = kv_cache.view(blocks * heads, 1, size * 2, both // 2).chunk(2, dim=2)
    return keys, values


def read_blocks(
    kv_cache: Float[Tensor, "blocks h size kv"], blocks: Int[Tensor, " n"]
) -> tuple[Float[Tensor, "h t d"], Float[Tensor, "h t d"]]:
    """Copies of the keys and values of every row in some blocks, in order."""
    _, heads, size, both = kv_cache.shape
    found = kv_cache[blocks.long()].view(len(blocks), heads, 2, size * both // 2)
    keys = found[:, :, 0].view(len(blocks), heads, both // 2, size).permute(1, 0, 3, 2)
    values = found[:, :, 1].view(len(blocks), heads, size, both // 2).permute(1, 0, 2, 3)
    return keys.reshape(heads, -1, both // 2), values.reshape(heads, -1, both // 2)


def write_rows(
    kv_cache: Float[Tensor, "blocks h size kv"],
    pages: Int[Tensor, " n"],
    keys: Float[Tensor, "rows d"],
    values: Float[Tensor, "rows d"],
    isa: str,
) -> None:
    """Fill those pages, which belong to one head, from the first on."""
    page_keys, page_values = of_cache(kv_cache)
    size = kv_cache.shape[2]
    slots = (pages.long()[:, None] * size + torch.arange(size, device=pages.device)).flatten()
    ops.cpu_attn_reshape_and_cache(
        keys[:, None].contiguous(), values[:, None].contiguous(), page_keys, page_values, slots, isa
    )


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
    found = read_blocks(scratch, torch.tensor([1, 2], device="cpu"))
    if not all(torch.equal(own, rows.transpose(0, 1)) for own, rows in zip(found, (keys, values), strict=True)):
        raise UnsupportedModelError(
            f"how vLLM's {isa!r} kernels lay out rows of {dtype} on this processor is not known"
        )
