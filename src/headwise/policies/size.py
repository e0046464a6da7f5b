"""Sizes: a count or a fraction, and what it is of -> a whole number of tokens for each sequence."""

from __future__ import annotations

from typing import Literal

import torch

from headwise.policies.tokens import Tokens
from headwise.types import Int, Tensor

Size = int | float

# What a fraction is of: all tokens seen so far, or those of the prompt.
Of = Literal["seen", "prompt"]

# 0.07 * 100 is 7.000000000000001 in floating point, and must not become 8 tokens.
_FLOAT_NOISE = 1e-9


def window_tokens(size: Size, length: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Width of a local window: 0 for size 0, else the rounded fraction of `length` and at least 1."""
    if isinstance(size, int):
        return torch.full_like(length, size)
    if size == 0.0:
        return torch.zeros_like(length)
    return (length.double() * size).round().long().clamp(min=1)


def whole(tokens: Tokens, of: Of) -> Int[Tensor, "b 1 1"]:
    """The tokens that a fraction is of."""
    return tokens.prompt if of == "prompt" else tokens.seen


def quota_tokens(size: Size, length: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Number of tokens that may be kept by rank: the fraction of `length`, rounded up."""
    if isinstance(size, int):
        return torch.full_like(length, size)
    return (length.double() * size - _FLOAT_NOISE).ceil().long().clamp(min=0)
