"""Match: a policy that chooses once -> its rows, with biases and values that stand for what was dropped."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import ClassVar

from headwise.errors import ConfigurationError
from headwise.policies.checks import check_count
from headwise.policies.wrapper import Wrapper

# As `ridge`, for the weights.
_WEIGHT_RIDGE = 0.1


@dataclass(frozen=True)
class Match(Wrapper):
    """Keeps what another policy chooses, and refits these rows so that each head's output stays as it was.

    After attention matching (Zweiger et al., arXiv 2602.16284, section 3). What dropping rows and storing them in few
    bits does to the outputs for reference queries is undone as far as other values and a bias on each row's logits can
    undo it, by two ridge regressions for each KV head. A bias takes two bytes of a row. Reference queries are a sample
    of the prompt's own, turned to positions behind it; `PeakAttention` and `Auto` also choose by what these look at.

    Args:
        policy: that chooses by scores, such as `Auto`, `KVzip` or `SnapKV`, also in fewer bits. Where it chooses again
            when more tokens have come, rows that stay keep their biases and values, and none are fitted anew.
        ridge: how much a change of values weighs against the error that it mends.
        queries: about how many reference queries each KV head has, over its group; it is fitted to some of them.
        bias: whether rows get a bias; without, only values are refitted, which takes no bytes.
        ahead: how many times as much as other attention that of reference queries counts where `PeakAttention` and
            `Auto` take the largest; 0 leaves the choice as it is.

    Raises:
        ConfigurationError: when the policy is none or goes on evicting, or a number is out of range.
    """

    name: ClassVar[str] = "match"

    ridge: int | float = 0.01
    queries: int = 2048
    bias: bool = True
    ahead: int | float = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        ridge = self.ridge
        if isinstance(ridge, bool) or not isinstance(ridge, int | float) or not 0 < ridge < inf:
            raise ConfigurationError(f"ridge must be a number above 0, got {ridge!r}")
        check_count("queries", self.queries, 1)
        if isinstance(self.ahead, bool) or not isinstance(self.ahead, int | float) or not 0 <= self.ahead < inf:
            raise ConfigurationError(f"ahead must be a number, 0 or more, got {self.ahead!r}")
        if not isinstance(self.bias, bool):
            raise ConfigurationError(f"bias must be True or False, got {self.bias!r}")
        later = [rung for rung in self.rungs if not (rung.chosen_once or rung.keeps_all)]
        if later:
            raise ConfigurationError(
                f"{self.policy} goes on evicting, and values are fitted to the rows that stay as a whole; Match wraps "
                "policies that choose by scores, such as Auto, PeakAttention, KVzip, SnapKV or AdaKV"
            )

    def __str__(self) -> str:
        """How Python would build it, without what is left at its default."""
        given = [
            f"{n}={getattr(self, n)}"
            for n in ("ridge", "queries", "bias", "ahead")
            if getattr(self, n) != getattr(Match, n)
        ]
        return f"Match({', '.join([str(self.policy), *given])})"

    @property
    def biased(self) -> bool:
        """As asked."""
        return self.bias

    @property
    def weight_ridge(self) -> float | None:
        """What the squared change of a row's weight counts; None where rows get no bias."""
        return _WEIGHT_RIDGE if self.bias else None

    @property
    def title(self) -> str:
        """The policy's, matched."""
        return f"{self.policy.title}, matched"
