"""Full: every token is kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from headwise.policies.base import Rule
from headwise.policies.registry import register
from headwise.policies.tokens import Tokens
from headwise.types import Bool, Tensor


@register("full")
@dataclass(frozen=True)
class Full(Rule):
    """Keeps everything: the reference every other policy is measured against (FastGen, section 3.4)."""

    @property
    def evicts(self) -> bool:
        """Never."""
        return False

    @property
    def keeps_all(self) -> bool:
        """Always."""
        return True

    def keep(self, tokens: Tokens) -> Bool[Tensor, "b h n"]:
        """Everything."""
        return torch.ones_like(tokens.valid)
