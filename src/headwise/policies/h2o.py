"""H2O: the heavy hitters and the newest tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

from headwise.policies.base import Policy, Rule
from headwise.policies.checks import check_size
from headwise.policies.frequent import Frequent
from headwise.policies.registry import register
from headwise.policies.size import Of, Size
from headwise.policies.window import Window


@register("h2o")
@dataclass(frozen=True)
class H2O(Policy):
    """Keeps a fixed number of heavy hitters and a local window in every head (Zhang et al., NeurIPS 2023, section 4).

    Heavy hitters are drawn from the tokens outside the window, so the two never overlap.

    Args:
        heavy: heavy hitters to keep: a count (int), or a fraction (float).
        recent: newest tokens to keep: a count (int), or a fraction (float).
        of: what a fraction is of: the tokens "seen" so far, or the "prompt".
    """

    heavy: Size
    recent: Size
    of: Of = "seen"

    def __post_init__(self) -> None:
        _ = self.rungs  # the rules check their own sizes

    @property
    def rungs(self) -> tuple[Rule, ...]:
        """One rule for every head."""
        return (Frequent(self.heavy, of=self.of, among="rest") | Window(self.recent, of=self.of),)

    def with_keep(self, keep: Size) -> H2O:
        """Half of them heavy hitters, half of them recent."""
        check_size("keep", keep)
        half = keep / 2 if isinstance(keep, float) else keep // 2
        return replace(self, heavy=half, recent=keep - half)
