"""KVzip: the tokens that the model needs to repeat its own prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from headwise.policies.checks import check_count, check_gate
from headwise.policies.evidence import Evidence
from headwise.policies.registry import register
from headwise.policies.scored import RepetitionScored, newest_first
from headwise.policies.size import Size
from headwise.types import Float, Tensor


@register("kvzip")
@dataclass(frozen=True)
class KVzip(RepetitionScored):
    """Keeps what was looked at while the model repeated the prompt (Kim et al., NeurIPS 2025, section 3).

    arXiv 2505.23416. A token's score is the largest attention it received from any query of its group; the budget
    is shared among all heads of all layers. Repeating costs about two prefills more, and the whole cache is held
    until then. With a gate nothing is repeated (after Fast KVzip, arXiv 2601.17668).

    Args:
        keep: tokens per KV head, on average over the model: a count (int), or a fraction (float).
        sinks: first tokens, which are kept.
        gate: True for scores that are predicted by gates trained for the model, so that it need not repeat anything:
            those that come with headwise, which are for its default model; or the folder of others.
        window: newest tokens that are kept at later choices, because hardly a query could look at them from afar.
    """

    keep: Size
    sinks: int = 4
    gate: bool | str = False
    window: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("sinks", self.sinks, 0)
        check_count("window", self.window, 0)
        check_gate(self.gate)

    def score(self, evidence: Evidence) -> Float[Tensor, "b h t"]:
        """Largest attention while repeating."""
        assert evidence.repetition_peaks is not None
        sinks = evidence.position < self.sinks
        return torch.where(sinks, torch.inf, evidence.repetition_peaks)

    def score_again(self, evidence: Evidence) -> Float[Tensor, "b h t"]:
        """What rows remember, but for the newest."""
        return newest_first(super().score_again(evidence), evidence, self.window)
