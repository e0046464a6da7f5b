"""Peak attention: every token that some query needed, while the model repeated its prompt or at the prompt's end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from headwise.policies.checks import check_count, check_gate, check_target
from headwise.policies.evidence import Evidence
from headwise.policies.registry import register
from headwise.policies.scored import Rechoosing, RepetitionScored, newest_first
from headwise.policies.size import Size
from headwise.policies.tokens import Tokens
from headwise.types import Bool, Float, Tensor


@register("peak-attention", former="recite")
@dataclass(frozen=True)
class PeakAttention(RepetitionScored):
    """Keeps each token that one query at least paid enough attention to: FastGen's question, asked for single tokens.

    FastGen asks how much of the attention mass a rule retains on average, and retrieval needs little mass. Here a
    token's worth is the largest attention it receives from any query of its group: of those that repeat the prompt,
    as in KVzip (Kim et al., NeurIPS 2025, arXiv 2505.23416, section 3), and of the last rows of the prompt, as in
    SnapKV (Li et al., NeurIPS 2024, section 4). With a recovery of T, a token is dropped only if no such query gave
    it 1 - T of its attention; every head then keeps the smallest set that does, however many that are. Sinks and a
    local window are always kept. Repeating costs about two prefills more, and the whole cache is held until then. With
    a gate nothing is repeated; the recovery is then that of the predicted attention.

    Args:
        recovery: T, from 0 to 1; 1 keeps everything.
        keep: instead of it, tokens per KV head, on average over the model: a count (int), or a
            fraction (float).
        window: newest tokens that are kept, and whose attention counts.
        sinks: first tokens, which are kept.
        gate: True for scores that are predicted by gates trained for the model, so that it need not repeat anything:
            those that come with headwise, which are for its default model; or the folder of others.
    """

    recovery: int | float | None = None
    keep: Size | None = None  # type: ignore[assignment]  # either this or the recovery
    window: int = 64
    sinks: int = 4
    gate: bool | str = False

    def __post_init__(self) -> None:
        check_target("peak-attention", self.recovery, self.keep)
        check_count("window", self.window, 1)
        check_count("sinks", self.sinks, 0)
        check_gate(self.gate)
        Rechoosing.__post_init__(self)

    @property
    def query_rows(self) -> int:
        """Those of the window."""
        return self.window

    def with_keep(self, keep: Size) -> PeakAttention:
        """A budget instead of the recovery."""
        return replace(self, recovery=None, keep=keep)

    def score(self, evidence: Evidence) -> Float[Tensor, "b h t"]:
        """Largest attention from any query that counts; more than 1 for what is always kept."""
        return self._always_kept(self.largest(evidence), evidence)

    def largest(self, evidence: Evidence) -> Float[Tensor, "b h t"]:
        """Largest attention from any query that counts."""
        assert evidence.repetition_peaks is not None
        best = evidence.repetition_peaks
        for block in evidence.attention(self.window):
            best = best.maximum(block.amax(dim=(2, 3)))
        if evidence.ahead is not None:
            best = best.maximum(evidence.ahead_counts * evidence.ahead())
        return best

    def score_again(self, evidence: Evidence) -> Float[Tensor, "b h t"]:
        """What rows remember."""
        assert evidence.remembered is not None
        return self._always_kept(evidence.remembered, evidence)

    def _always_kept(self, best: Float[Tensor, "b h t"], evidence: Evidence) -> Float[Tensor, "b h t"]:
        return torch.where(evidence.position < self.sinks, torch.inf, newest_first(best, evidence, self.window))

    def select(self, scores: Sequence[Float[Tensor, "b h _"]], tokens: Sequence[Tokens]) -> list[Bool[Tensor, "b h _"]]:
        """What got enough, or the best of the model."""
        if self.recovery is not None:
            return [(score >= 1 - self.recovery) & facts.pool for score, facts in zip(scores, tokens, strict=True)]
        return super().select(scores, tokens)
