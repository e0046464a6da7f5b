"""StreamingLLM: the first tokens and the newest ones."""

from __future__ import annotations

from dataclasses import dataclass

from headwise.policies.base import Policy, Rule
from headwise.policies.registry import register
from headwise.policies.sinks import Sinks
from headwise.policies.size import Size
from headwise.policies.window import Window


@register("streamingllm")
@dataclass(frozen=True)
class StreamingLLM(Policy):
    """Keeps attention sinks and a local window in every head (Xiao et al., ICLR 2024, section 3.2).

    Kept keys stay at their own positions; the original renumbers positions inside the cache.

    Args:
        window: newest tokens to keep: a count (int), or a fraction of the prompt (float).
        sinks: first tokens to keep.
    """

    window: Size
    sinks: int = 4

    def __post_init__(self) -> None:
        _ = self.rungs  # the rules check their own sizes

    @property
    def rungs(self) -> tuple[Rule, ...]:
        """One rule for every head."""
        return (Sinks(self.sinks) | Window(self.window),)
