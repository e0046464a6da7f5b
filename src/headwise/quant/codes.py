"""Codes: rows of numbers -> a few bits for each and the steps to read them by, and back."""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from headwise.types import Float, Tensor, UInt8

# Of what codes are read by.
STEP_DTYPE = torch.float16


@lru_cache(maxsize=64)
def hadamard(dim: int, device: torch.device) -> Float[Tensor, "dim dim"]:
    """An orthogonal matrix, in fp32, with which a few large channels are spread over all of them.

    Rows of keys have channels many times larger than the others, which would set the step for all of them. After a
    Hadamard transform no channel stands out (QuaRot, Ashkboos et al., NeurIPS 2024, section 4). Of a size that is no
    power of 2, the odd factor is a cosine transform.
    """
    odd = dim
    while odd % 2 == 0:
        odd //= 2
    at = torch.arange(odd, dtype=torch.float64, device="cpu")
    matrix: Tensor = (math.pi / odd * (at + 0.5) * at[:, None]).cos() * (2 / odd) ** 0.5
    matrix[0] /= 2**0.5
    while len(matrix) < dim:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) / 2**0.5
    return matrix.float().to(device)


def span(rows: Float[Tensor, "*n d"]) -> Float[Tensor, "*n"]:
    """How far the numbers of each row lie apart once it is rotated, as far as its codes have to reach."""
    low, high = _ends(rows.float() @ hadamard(rows.shape[-1], rows.device))
    return high - low


def encode(
    rows: Float[Tensor, "*n d"], bits: int, group: int
) -> tuple[UInt8[Tensor, "*n c"], Float[Tensor, "*n steps"]]:
    """Numbers as codes, each group of channels by its own smallest and largest number.

    Args:
        rows: to be read back as they are given: rotated ones, where they are to be rotated.
        bits: of a code, 4 or 8.
        group: channels in a group; divides d.

    Returns:
        the bytes, and the steps and least numbers of the groups; see `headwise.kernels.interface.Coding`.
    """
    codes, step, low = _codes(rows, bits, group)
    coded = codes.flatten(-2).to(torch.uint8)
    if bits == 4:
        first, second = coded.chunk(2, dim=-1)
        coded = first | (second << 4)
    return coded, torch.cat([step, low], dim=-1)


def decode(codes: UInt8[Tensor, "*n c"], steps: Float[Tensor, "*n steps"], bits: int) -> Float[Tensor, "*n d"]:
    """The numbers that codes stand for, in fp32; rotated, if they were."""
    if bits == 4:
        codes = torch.cat([codes & 15, codes >> 4], dim=-1)
    step, low = steps.float().chunk(2, dim=-1)
    grouped = codes.float().unflatten(-1, (step.shape[-1], -1))
    numbers: Tensor = (grouped * step[..., None] + low[..., None]).flatten(-2)
    return numbers


def rounded(rows: Float[Tensor, "*n d"], bits: int, group: int) -> Float[Tensor, "*n d"]:
    """What is read back of numbers that were stored as codes, in fp32, without making the bytes."""
    codes, step, low = _codes(rows, bits, group)
    return codes.mul_(step.float()[..., None]).add_(low.float()[..., None]).flatten(-2)


def _codes(rows: Float[Tensor, "*n d"], bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes `[*n, groups, group]` as fp32, and the steps and least numbers of their groups."""
    grouped = rows.float().unflatten(-1, (-1, group))
    low, high = _ends(grouped)
    # Codes are made with the numbers they will be read by, after these have been rounded.
    step = _representable((high - low) / (2**bits - 1))
    low = _representable(low)
    # Where there is nothing to tell apart, every code reads as the least number.
    spread = step.where(step > 0, 1).float()[..., None]
    return (grouped - low.float()[..., None]).div_(spread).round_().clamp_(0, 2**bits - 1), step, low


def _ends(numbers: Tensor) -> tuple[Tensor, Tensor]:
    # One after the other: along the last dimension torch's `aminmax` takes six times as long on a CPU.
    return numbers.amin(dim=-1), numbers.amax(dim=-1)


def _representable(numbers: Tensor) -> Tensor:
    # What bf16 can hold and fp16 cannot would become infinite, and the whole row with it.
    largest = torch.finfo(STEP_DTYPE).max
    return numbers.clamp(-largest, largest).to(STEP_DTYPE)
