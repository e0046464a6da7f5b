"""SnapKV: the tokens that the end of the prompt looks at, with their neighbours."""

from __future__ import annotations

from dataclasses import dataclass

from torch.nn import functional

from headwise.policies.checks import check_count
from headwise.policies.evidence import Evidence
from headwise.policies.registry import register
from headwise.policies.scored import Scored, by_position, newest_first
from headwise.policies.size import Size
from headwise.types import Float, Tensor


@register("snapkv")
@dataclass(frozen=True)
class SnapKV(Scored):
    """Keeps what an observation window at the end of the prompt attends to (Li et al., NeurIPS 2024, section 4).

    The scores are averaged over the window's rows and the queries of a group, and over neighbouring tokens; the
    window itself is kept.

    Args:
        keep: tokens per KV head, the window among them: a count (int), or a fraction (float).
        window: rows at the end of the prompt that vote.
        kernel: tokens that are averaged, an odd number; 1 leaves the scores as they are.
    """

    keep: Size
    window: int = 64
    kernel: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("window", self.window, 1)
        check_count("kernel", self.kernel, 1, odd=True)

    @property
    def query_rows(self) -> int:
        """The window."""
        return self.window

    def score(self, evidence: Evidence) -> Float[Tensor, "b h t"]:
        """Attention of the window on each token before it, smoothed."""
        votes = evidence.mean_attention(self.window)
        before = votes.mean(dim=2) * ((evidence.age >= self.window) & evidence.real)
        smooth = by_position(lambda votes: smoothed(votes, self.kernel), before, evidence)
        return newest_first(smooth, evidence, self.window)


def smoothed(score: Float[Tensor, "b h t"], kernel: int) -> Float[Tensor, "b h t"]:
    """The mean over `kernel` neighbours; there is nothing beyond the ends."""
    return functional.avg_pool1d(score, kernel, stride=1, padding=kernel // 2)


__all__ = ["SnapKV", "smoothed"]
