"""Turns: whoever is measured side by side, and the number of a round -> the order of that round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def turns(contenders: Sequence[T], number: int) -> list[T]:
    """The order of a round: everyone's turn comes, and nobody is always the first."""
    start = number % len(contenders)
    return [*contenders[start:], *contenders[:start]]
