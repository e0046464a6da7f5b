"""Sinks: the first tokens of the prompt."""

from __future__ import annotations

from dataclasses import dataclass

from headwise.policies.base import Rule
from headwise.policies.checks import check_count
from headwise.policies.registry import register
from headwise.policies.tokens import Tokens
from headwise.types import Bool, Tensor


@register("sinks")
@dataclass(frozen=True)
class Sinks(Rule):
    """Keeps the first tokens, which models use to park attention (Xiao et al., StreamingLLM, ICLR 2024, section 3).

    Args:
        count: how many; padding is not counted.
    """

    count: int = 4

    def __post_init__(self) -> None:
        check_count("sinks", self.count, 0)

    def keep(self, tokens: Tokens) -> Bool[Tensor, "b h n"]:
        """Positions below `count`."""
        return tokens.position < self.count
