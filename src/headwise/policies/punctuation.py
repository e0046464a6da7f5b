"""Punctuation: tokens that are punctuation and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from headwise.policies.base import Fact, Rule
from headwise.policies.registry import register
from headwise.policies.tokens import Tokens
from headwise.types import Bool, Kind, Tensor


@register("punctuation")
@dataclass(frozen=True)
class Punctuation(Rule):
    """Keeps full stops, colons, question marks and their kin: Unicode category P (FastGen, section 3.4)."""

    @property
    def reads(self) -> frozenset[Fact]:
        """The kind of a token."""
        return frozenset({"kind"})

    def keep(self, tokens: Tokens) -> Bool[Tensor, "b h n"]:
        """Tokens with the punctuation bit."""
        assert tokens.kind is not None
        return (tokens.kind & int(Kind.PUNCTUATION)) != 0
