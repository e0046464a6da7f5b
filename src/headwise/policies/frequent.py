"""Frequent: the heavy hitters, tokens that have received the most attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from headwise.policies.base import Fact, Rule
from headwise.policies.checks import check_choice, check_size, check_switch
from headwise.policies.registry import register
from headwise.policies.size import Of, Size, quota_tokens, whole
from headwise.policies.tokens import Tokens
from headwise.types import Bool, Tensor


@register("frequent")
@dataclass(frozen=True)
class Frequent(Rule):
    """Keeps the tokens with the largest accumulated attention mass (Zhang et al., H2O, NeurIPS 2023, section 4).

    Args:
        size: how many: tokens (int), or a fraction (float), rounded up.
        of: what a fraction refers to: the tokens "seen" so far (FastGen, section 3.4), so that the quota grows
            while generating, or the "prompt".
        among: "all" ranks every token; "rest" only those that no other member of the union keeps.
        normalize: divide a token's mass by the number of queries that could see it, so that early tokens have
            no head start.
    """

    size: Size
    of: Of = "seen"
    among: Literal["all", "rest"] = "all"
    normalize: bool = False

    def __post_init__(self) -> None:
        check_size("frequent size", self.size)
        check_choice("of", self.of, get_args(Of))
        check_choice("among", self.among, ("all", "rest"))
        check_switch("normalize", self.normalize)

    @property
    def reads(self) -> frozenset[Fact]:
        """The accumulated attention mass."""
        return frozenset({"score"})

    @property
    def ranks_rest(self) -> bool:
        """As configured by `among`."""
        return self.among == "rest"

    def keep(self, tokens: Tokens) -> Bool[Tensor, "b h n"]:
        """Tokens whose rank is below the quota."""
        assert tokens.score is not None
        queries = (tokens.seen - tokens.position).clamp(min=1)
        score = tokens.score / queries if self.normalize else tokens.score
        quota = quota_tokens(self.size, whole(tokens, self.of))
        return (tokens.rank(score) < quota) & tokens.pool

    def with_keep(self, keep: Size) -> Frequent:
        """So many of the heaviest."""
        return replace(self, size=keep)
