"""Random: a uniform sample of all tokens seen, the baseline every method must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch

from headwise.errors import ConfigurationError
from headwise.policies.base import Policy, Rule
from headwise.policies.checks import check_choice, check_size
from headwise.policies.registry import register
from headwise.policies.size import Of, Size, quota_tokens, whole
from headwise.policies.tokens import Tokens
from headwise.types import Bool, Float, Int, Tensor

# Odd constants of the SplitMix64 and golden-ratio families, as signed 64-bit integers.
_MIX = (-7046029254386353131, -4658895280553007687, -7723592293110705685)
_LOW_31_BITS = 0x7FFFFFFF


@dataclass(frozen=True)
class Lottery(Rule):
    """Keeps the tokens with the highest lots; a lot is drawn once, from seed, layer, head and position."""

    size: Size
    seed: int
    of: Of = "seen"

    @property
    def label(self) -> str:
        """What is reported."""
        return "random"

    def keep(self, tokens: Tokens) -> Bool[Tensor, "b h n"]:
        """Tokens whose lot ranks below the quota."""
        return (tokens.rank(self._lots(tokens)) < quota_tokens(self.size, whole(tokens, self.of))) & tokens.pool

    def _lots(self, tokens: Tokens) -> Float[Tensor, "b h n"]:
        heads = torch.arange(tokens.position.shape[1], device=tokens.position.device).view(1, -1, 1)
        # Wrapped into 64 bits: Python's whole numbers have no end, a tensor's do.
        stream = ((tokens.layer * 1_000_003 + self.seed) * _MIX[2]) % 2**63
        bits = tokens.position.long() * _MIX[0] + heads * _MIX[1] + stream
        return _scramble(bits).float()


@register("random")
@dataclass(frozen=True)
class Random(Policy):
    """Keeps tokens by lot, independently in every layer and KV head: the baseline to beat.

    At any time the kept tokens are a uniform sample of everything seen (reservoir sampling; of a fraction that grows,
    nearly: what was dropped does not come back), and a sequence keeps the same tokens alone and in a batch. After
    "random eviction" of the Random Attention report, arXiv 2609.03430.

    Args:
        keep: how many: tokens (int), or a fraction (float), rounded up.
        seed: of the draw.
        of: what a fraction is of: the tokens "seen" so far, or the "prompt".
    """

    keep: Size
    seed: int = 0
    of: Of = "seen"

    def __post_init__(self) -> None:
        check_size("keep", self.keep)
        check_choice("of", self.of, get_args(Of))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ConfigurationError(f"seed must be a whole number, got {self.seed!r}")

    @property
    def rungs(self) -> tuple[Rule, ...]:
        """One rule for every head."""
        return (Lottery(self.keep, self.seed, self.of),)


def _scramble(bits: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """SplitMix64's finaliser; multiplication wraps around, as it should."""
    bits = (bits ^ ((bits >> 30) & 0x3FFFFFFFF)) * _MIX[1]
    bits = (bits ^ ((bits >> 27) & 0x1FFFFFFFFF)) * _MIX[2]
    return (bits ^ ((bits >> 31) & 0x1FFFFFFFF)) & _LOW_31_BITS
