"""StreamingLLM: the first tokens and the newest ones."""

from __future__ import annotations

from dataclasses import dataclass, replace

from headwise.policies.base import Policy, Rule
from headwise.policies.checks import check_switch
from headwise.policies.registry import register
from headwise.policies.sinks import Sinks
from headwise.policies.size import Of, Size
from headwise.policies.window import Window


@register("streamingllm")
@dataclass(frozen=True)
class StreamingLLM(Policy):
    """Keeps attention sinks and a local window in every head (Xiao et al., ICLR 2024, section 3.2).

    Kept keys stay at their own positions; the original renumbers positions inside the cache.

    Args:
        window: newest tokens to keep: a count (int), or a fraction (float).
        sinks: first tokens to keep, beside the window.
        within: whether `window` counts the sinks too, and so is all that is kept.
        of: what a fraction is of: the tokens "seen" so far, or the "prompt".
    """

    window: Size
    sinks: int = 4
    within: bool = False
    of: Of = "seen"

    def __post_init__(self) -> None:
        check_switch("within", self.within)
        _ = self.rungs  # the rules check their own sizes

    @property
    def rungs(self) -> tuple[Rule, ...]:
        """One rule for every head."""
        return (Sinks(self.sinks) | Window(self.window, self.sinks if self.within else 0, self.of),)

    def with_keep(self, keep: Size) -> StreamingLLM:
        """Sinks and window together."""
        return replace(self, window=keep, within=True)
