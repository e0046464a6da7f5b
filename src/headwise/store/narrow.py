"""Narrow: numbers and the type they are stored in -> the same numbers in it, none of them beyond its largest."""

from __future__ import annotations

import warnings

import torch

from headwise.errors import HeadwiseWarning
from headwise.types import Tensor

_EXACT = "keep them in the type of the model (cache_dtype=None), or in bfloat16"


def narrow(numbers: Tensor, dtype: torch.dtype, what: str, *, waits: bool = True) -> Tensor:
    """The numbers in another type; a warning says where some were beyond its range. What is infinite stays so.

    Args:
        what: they are, for the warning.
        waits: False where the host must not wait for the device, and then does not warn.
    """
    if numbers.dtype is dtype or torch.finfo(dtype).max >= torch.finfo(numbers.dtype).max:
        return numbers.to(dtype)
    return within(numbers, dtype, what, _EXACT, waits=waits).to(dtype)


def within(numbers: Tensor, dtype: torch.dtype, what: str, remedy: str, *, waits: bool = True) -> Tensor:
    """The numbers in their own type, none of them beyond what another can hold but those that are infinite."""
    largest = torch.finfo(dtype).max
    if waits and numbers.numel():
        low, high = numbers.aminmax()
        # Not so where one is no number.
        if bool((low >= -largest) & (high <= largest)):
            return numbers
    beyond = (numbers.abs() > largest) & ~numbers.isinf()
    if waits and not bool(beyond.any()):
        return numbers
    if waits:
        warnings.warn(
            f"{int(beyond.sum())} numbers of {what} are beyond {largest:,.0f}, the largest that {dtype} can hold, and "
            f"are stored as that; {remedy}",
            HeadwiseWarning,
            stacklevel=2,
        )
    return numbers.clamp(-largest, largest).where(beyond, numbers)
