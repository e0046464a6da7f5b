"""Window: the newest tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import get_args

import torch

from headwise.policies.base import Rule
from headwise.policies.checks import check_choice, check_count, check_size
from headwise.policies.registry import register
from headwise.policies.size import Of, Size, whole, window_tokens
from headwise.policies.tokens import Tokens
from headwise.types import Bool, Int, Tensor


@register("window")
@dataclass(frozen=True)
class Window(Rule):
    """Keeps a local window of the newest tokens.

    Args:
        size: tokens (int), or a fraction (float), rounded and at least 1.
        less: tokens of those that others need, such as sinks; at least 1 remains.
        of: what a fraction is of: the tokens "seen" so far, or the "prompt", so that the width is one for the whole
            run (FastGen, section 3.4).
    """

    size: Size
    less: int = 0
    of: Of = "seen"

    def __post_init__(self) -> None:
        check_size("window size", self.size)
        check_count("less", self.less, 0)
        check_choice("of", self.of, get_args(Of))

    @property
    def label(self) -> str:
        """The paper's word for it."""
        return "local"

    def keep(self, tokens: Tokens) -> Bool[Tensor, "b h n"]:
        """Tokens younger than the width."""
        return tokens.age < self.width(whole(tokens, self.of))

    def static(self, tokens: Tokens) -> Bool[Tensor, "b h n"]:
        """Nothing: a window moves with the query."""
        return torch.zeros_like(tokens.valid)

    def width(self, prompt: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """The size in tokens, of so many."""
        width = window_tokens(self.size, prompt)
        return (width - self.less).clamp(min=1) if self.less else width

    def with_keep(self, keep: Size) -> Window:
        """So many of the newest."""
        return replace(self, size=keep)
