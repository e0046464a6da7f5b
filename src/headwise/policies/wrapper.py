"""Wrapper: a policy -> the same choice of tokens, and something more done with them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from headwise.errors import ConfigurationError
from headwise.policies.base import Policy, Rule
from headwise.policies.size import Size
from headwise.quant.formats import Precision


@dataclass(frozen=True)
class Wrapper(Policy):
    """Keeps what another policy keeps; subclasses say what else happens.

    Raises:
        ConfigurationError: when it wraps no policy, or one that does the same already.
    """

    policy: Policy

    def __post_init__(self) -> None:
        kind = type(self)
        if not isinstance(self.policy, Policy) or any(isinstance(inner, kind) for inner in wrappers(self.policy)):
            raise ConfigurationError(f"{kind.__name__} wraps a policy such as H2O(keep=0.05), got {self.policy!r}")

    @property
    def chooser(self) -> Policy:
        """What decides which rows stay."""
        return self.policy.chooser

    @property
    def precision(self) -> Precision | None:
        """As the policy has it."""
        return self.policy.precision

    @property
    def biased(self) -> bool:
        """Whether rows may get a bias, which takes bytes."""
        return False

    @property
    def rungs(self) -> tuple[Rule, ...]:
        """Those of the policy. All else that is asked of a policy that chooses is asked of `chooser`."""
        return self.policy.rungs

    def with_keep(self, keep: Size) -> Policy:
        """With another budget for the rows.

        Raises:
            ConfigurationError: when the policy has no such budget, or the number is out of range.
        """
        return replace(self, policy=self.policy.with_keep(keep))

    def with_bytes(self, count: int) -> Policy | None:
        """With so many bytes for the rows, where the policy counts in bytes."""
        inner = self.policy.with_bytes(count)
        return None if inner is None else replace(self, policy=inner)


def wrappers(policy: Policy) -> Iterator[Wrapper]:
    """Every wrapper around the policy that chooses, from the outermost."""
    while isinstance(policy, Wrapper):
        yield policy
        policy = policy.policy
