"""Tiles: the shapes of a request -> the sizes that its launches go by.

They depend on nothing that changes from token to token, so each is worked out once. By the compiler's account for
sm_90, registers hardly spill, and two programs of a decode step share a processor.
"""

from __future__ import annotations

import functools

import torch

from headwise.kernels.interface import DecodeRequest, PageView
from headwise.kernels.triton.codes import code_tiles, is_half
from headwise.kernels.triton.launch import LAUNCH, power

# Programs per processor that splitting aims at: two fit at a time, and heads differ in length, so that some of them
# end at once.
_PROGRAMS = 4


def tiles_of_view(request: DecodeRequest, view: PageView, narrow: bool) -> dict[str, int]:
    """Of a launch that attends to one view.

    Args:
        narrow: whether products of exact rows go to the tensor cores as they are.
    """
    members, key_dim = request.query.shape[2] * request.query.shape[3], request.query.shape[-1]
    value_dim = request.fresh_values.shape[-1]
    if view.coding is None:
        return decode_tiles(members, key_dim, value_dim, narrow)
    bits = view.coding.key_bits, view.coding.value_bits
    return code_tiles(members, key_dim, value_dim, *bits, is_half(request.query), request.marks is not None)


def cut_into_splits(longest: int, programs: int, block: int, device: torch.device) -> tuple[int, int]:
    """How many splits, and of how many rows each, where one split takes that many programs."""
    wanted = max(1, -(-_PROGRAMS * _processors(device) // programs))
    rows = max(1, -(-longest // (wanted * block))) * block
    return -(-longest // rows), rows


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def decode_tiles(members: int, key_dim: int, value_dim: int, narrow: bool) -> dict[str, int]:
    """Of a launch over exact rows."""
    width = max(power(key_dim), power(value_dim))
    sizes = LAUNCH | {"D": key_dim, "E": value_dim, "BLOCK_D": power(key_dim), "BLOCK_E": power(value_dim)}
    if not narrow:
        rows = 32 if width <= 64 else 16
        return sizes | {"BLOCK_M": min(power(members, 1), 8), "BLOCK_N": rows, "num_warps": 8}
    # The addresses of the rows are loaded before the rows, which takes the pipeline one stage more than usual.
    if width <= 128:
        warps = 4 if members <= 32 else 8
        return sizes | {"BLOCK_M": min(power(members), 64), "BLOCK_N": 64, "num_stages": 4, "num_warps": warps}
    return sizes | {"BLOCK_M": min(power(members), 32), "BLOCK_N": 32, "num_stages": 3}


@functools.cache
def append_tiles(fresh: int, key_dim: int, value_dim: int) -> dict[str, int]:
    """Of a launch that writes new rows."""
    sizes = LAUNCH | {"D": key_dim, "E": value_dim, "BLOCK_D": power(key_dim), "BLOCK_E": power(value_dim)}
    return sizes | {"BLOCK_F": 1 if fresh == 1 else 16, "BLOCK_N": 1024}
