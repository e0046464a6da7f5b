"""AdaKV: another policy's scores, with the budget of a layer shared among its heads by need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from headwise.errors import ConfigurationError
from headwise.policies.checks import check_size
from headwise.policies.evidence import Evidence
from headwise.policies.registry import create_policy, register
from headwise.policies.scored import Scored, across, highest
from headwise.policies.size import Size
from headwise.policies.tokens import Tokens
from headwise.types import Bool, Float, Tensor


@register("adakv")
@dataclass(frozen=True)
class AdaKV(Scored):
    """Keeps the best tokens of a layer whatever their head, and some in every head (Feng et al., 2024, section 3).

    arXiv 2407.11550, algorithm 1. `keep` is the mean over the heads.

    Args:
        keep: tokens per KV head, on average: a count (int), or a fraction (float).
        over: whose scores: the name of a policy that scores tokens, or such a policy.
        safeguard: share of the budget that every head has to itself.
    """

    keep: Size
    over: str | Scored = "snapkv"
    safeguard: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_size("safeguard", self.safeguard)
        _ = self._scorer

    @cached_property
    def _scorer(self) -> Scored:
        scorer = create_policy(self.over, keep=self.keep) if isinstance(self.over, str) else self.over
        if not isinstance(scorer, Scored) or scorer.needs_all_layers:
            raise ConfigurationError(f"adakv needs a policy that scores the tokens of one layer, got {self.over!r}")
        return scorer

    @property
    def needs_rotation(self) -> bool:
        """As the scores do."""
        return self._scorer.needs_rotation

    @property
    def query_rows(self) -> int | None:
        """As the scores need them."""
        return self._scorer.query_rows

    def score(self, evidence: Evidence) -> Float[Tensor, "b h t"]:
        """The other policy's."""
        return self._scorer.score(evidence)

    def select(self, scores: Sequence[Float[Tensor, "b h _"]], tokens: Sequence[Tokens]) -> list[Bool[Tensor, "b h _"]]:
        """The best of every head, and of what is left the best of the layer."""
        return [self._shared(score, facts) for score, facts in zip(scores, tokens, strict=True)]

    def _shared(self, score: Tensor, tokens: Tokens) -> Bool[Tensor, "b h t"]:
        quota = self.quota(tokens)
        own = highest(score, tokens, (quota * self.safeguard).long())
        layer = across([score], [tokens.among(~own)], quota * score.shape[1] - own.sum(dim=(1, 2))[:, None, None])
        return own | layer[0]

    def with_keep(self, keep: Size) -> AdaKV:
        """The same scores, with another budget."""
        return replace(self, keep=keep)
