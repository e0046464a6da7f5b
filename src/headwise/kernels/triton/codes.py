"""Triton for pages of codes: queries and views of codes -> launches of the kernels in `device_codes`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from headwise.kernels.interface import Coding, PageView
from headwise.kernels.triton.launch import LAUNCH, device_code, power
from headwise.types import Float, Tensor


def attend_codes(
    query: Float[Tensor, "b h g q d"],
    views: Sequence[PageView],
    tiles: Sequence[dict[str, int]],
    cuts: Sequence[tuple[int, int]],
    first: int,
    begin: int,
    every: dict[str, Any],
) -> None:
    """Attention over the rows of each view, in a launch of its own; one more turns the queries for all of them.

    Args:
        tiles: of each view, as `code_tiles` gives them.
        cuts: of each view, how many splits, and of how many rows each.
        first: part that the first split is.
        begin: rows of the exact view, padded to its longest head.
        every: arguments that are the same in every launch, by name.
    """
    if not views:
        return
    batch, heads, group, queries, dim = query.shape
    members = group * queries
    code = device_code()
    turned = torch.empty(
        batch * heads, members, dim, dtype=torch.float16 if is_half(query) else torch.float32, device=query.device
    )
    code.turn[(batch * heads * members,)](
        query,
        hadamard_of(views, "key_hadamard"),
        turned,
        query.stride(),
        heads,
        queries,
        GROUP=group,
        D=dim,
        BLOCK_D=power(dim),
        **turning(dim),
    )
    for index, (view, sizes, (splits, split_rows)) in enumerate(zip(views, tiles, cuts, strict=True)):
        coding = coding_of(view)
        table = view.table.contiguous()
        code.attend_codes[batch * heads, splits, -(-members // sizes["BLOCK_M"])](
            turned,
            view.keys,
            view.values,
            words(coding.key_steps),
            words(coding.value_steps),
            view.columns,
            view.biases,
            table,
            view.lengths,
            length_stride=view.lengths.stride(),
            first=first,
            split_rows=split_rows,
            begin=begin,
            view=1 + index,
            pages=table.shape[2],
            PAGE=view.page_size,
            KEY_GROUPS=coding.key_steps.shape[2] // 2,
            VALUE_GROUPS=coding.value_steps.shape[2] // 2,
            NARROW=is_half(query),
            **sizes,
            **every,
        )
        first, begin = first + splits, begin + view.longest


def is_half(query: Tensor) -> bool:
    """Whether codes and queries become 16-bit numbers, for the tensor cores."""
    return query.dtype.itemsize == 2


def words(steps: Float[Tensor, "pages s steps"]) -> Tensor:
    """The same memory; where a row has one group, its step and its least number are one word."""
    return steps.view(torch.int32) if steps.shape[2] == 2 else steps


def coding_of(view: PageView) -> Coding:
    """How the codes of a view of codes are read."""
    assert view.coding is not None
    return view.coding


def hadamard_of(views: Sequence[PageView], name: str) -> Tensor | None:
    """The matrix of that name, which all views of codes share."""
    matrices = [getattr(coding_of(view), name) for view in views]
    assert all(matrix is matrices[0] for matrix in matrices)
    return matrices[0].contiguous() if matrices else None


@functools.cache
def code_tiles(
    members: int, key_dim: int, value_dim: int, key_bits: int, value_bits: int, half: bool, marked: bool
) -> dict[str, int]:
    """Sizes that a launch over codes goes by; blocks of channels are in bytes."""
    blocks = {"BLOCK_D": power(key_dim * key_bits // 8), "BLOCK_E": power(value_dim * value_bits // 8)}
    bits = {"KEY_BITS": key_bits, "VALUE_BITS": value_bits}
    sizes = LAUNCH | blocks | bits | {"D": key_dim, "E": value_dim}
    width = max(power(key_dim), power(value_dim))
    if not half:
        return sizes | {"BLOCK_M": min(power(members, 1), 8), "BLOCK_N": 32 if width <= 64 else 16, "num_warps": 8}
    # The pipeline spends stages on the addresses and two on each block of rows that is under way, or three where marks
    # are looked up by columns, as those are by addresses. Codes are few bytes, so that it takes several blocks, or many
    # programs, to keep the memory busy.
    rows, under_way = min(power(members), 32), 3 if width <= 128 else 2
    ahead = {"BLOCK_N": 64 if width <= 128 else 32, "num_stages": (3 if marked else 2) * under_way + 1}
    return sizes | ahead | {"BLOCK_M": rows, "num_warps": 4 if rows == 16 else 8}


@functools.cache
def turning(dim: int) -> dict[str, int]:
    """Options of a launch whose programs multiply one row of so many channels with a matrix."""
    return LAUNCH | {"num_warps": min(16, max(4, power(dim) ** 2 // 2048))}
