"""Sinks: the first tokens of the prompt."""

from __future__ import annotations

from dataclasses import dataclass

from headwise.errors import ConfigurationError
from headwise.policies.base import Rule
from headwise.policies.registry import register
from headwise.types import Bool, Tensor, Tokens


@register("sinks")
@dataclass(frozen=True)
class Sinks(Rule):
    """Keeps the first tokens, which models use to park attention (Xiao et al., StreamingLLM, ICLR 2024, section 3).

    Args:
        count: how many; padding is not counted.
    """

    count: int = 4

    def __post_init__(self) -> None:
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 0:
            raise ConfigurationError(f"sinks must be a count of 0 or more, got {self.count!r}")

    def keep(self, tokens: Tokens) -> Bool[Tensor, "b h n"]:
        """Positions below `count`."""
        return tokens.position < self.count
