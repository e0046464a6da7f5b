"""Sizes: a count or a fraction from the configuration -> a whole number of tokens for each sequence."""

from __future__ import annotations

import torch

from headwise.errors import ConfigurationError
from headwise.types import Int, Tensor

Size = int | float

# 0.07 * 100 is 7.000000000000001 in floating point, and must not become 8 tokens.
_FLOAT_NOISE = 1e-9

# Columns are stored as 32-bit integers.
_MOST_TOKENS = 2**31 - 1


def check_size(name: str, size: Size) -> None:
    """Refuse what is neither a count of tokens nor a fraction.

    Raises:
        ConfigurationError: for a negative count, a fraction outside 0 to 1, or something that is no number.
    """
    if isinstance(size, bool) or not isinstance(size, int | float):
        raise ConfigurationError(f"{name} must be a count (int) or a fraction (float), got {size!r}")
    if isinstance(size, int) and not 0 <= size <= _MOST_TOKENS:
        raise ConfigurationError(f"{name} must be a count from 0 to {_MOST_TOKENS}, got {size}")
    if isinstance(size, float) and not 0.0 <= size <= 1.0:
        raise ConfigurationError(f"{name} must be a fraction from 0.0 to 1.0, got {size} (a count is an int)")


def check_count(name: str, count: int, least: int, *, odd: bool = False) -> None:
    """Refuse what is no whole number of at least `least`.

    Raises:
        ConfigurationError: naming the parameter.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < least or (odd and count % 2 == 0):
        raise ConfigurationError(f"{name} must be {'an odd' if odd else 'a'} count of {least} or more, got {count!r}")


def window_tokens(size: Size, length: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Width of a local window: 0 for size 0, else the rounded fraction of `length` and at least 1."""
    if isinstance(size, int):
        return torch.full_like(length, size)
    if size == 0.0:
        return torch.zeros_like(length)
    return (length.double() * size).round().long().clamp(min=1)


def quota_tokens(size: Size, length: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Number of tokens that may be kept by rank: the fraction of `length`, rounded up."""
    if isinstance(size, int):
        return torch.full_like(length, size)
    return (length.double() * size - _FLOAT_NOISE).ceil().long().clamp(min=0)
