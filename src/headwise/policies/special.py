"""Special: the special tokens of the prompt and of the text being generated."""

from __future__ import annotations

from dataclasses import dataclass

from headwise.policies.base import Fact, Rule
from headwise.policies.registry import register
from headwise.policies.tokens import Tokens
from headwise.types import Bool, Kind, Tensor


@register("special")
@dataclass(frozen=True)
class Special(Rule):
    """Keeps special tokens: BOS, turn markers, instruction markers (FastGen, section 3.4)."""

    @property
    def reads(self) -> frozenset[Fact]:
        """The kind of a token."""
        return frozenset({"kind"})

    def keep(self, tokens: Tokens) -> Bool[Tensor, "b h n"]:
        """Tokens with the special bit."""
        assert tokens.kind is not None
        return (tokens.kind & int(Kind.SPECIAL)) != 0
