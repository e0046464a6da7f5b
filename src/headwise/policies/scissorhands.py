"""Scissorhands: the tokens that were important again and again."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from headwise.policies.checks import check_count
from headwise.policies.evidence import Evidence
from headwise.policies.registry import register
from headwise.policies.scored import Scored, newest_first
from headwise.policies.size import Size
from headwise.types import Float, Tensor


@register("scissorhands")
@dataclass(frozen=True)
class Scissorhands(Scored):
    """Keeps pivotal tokens: those most often above the average attention (Liu et al., NeurIPS 2023, algorithm 2).

    A token is important to a query when it gets more than an equal share of its attention. The count is over a
    window of history at the end of the prompt, and over the queries of a group; the newest tokens are kept.

    Args:
        keep: tokens per KV head, the recent ones among them: a count (int), or a fraction (float).
        history: rows at the end of the prompt that are counted.
        recent: newest tokens that are kept whatever their count.
    """

    keep: Size
    history: int = 256
    recent: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("history", self.history, 1)
        check_count("recent", self.recent, 0)

    @property
    def query_rows(self) -> int:
        """The history."""
        return self.history

    def score(self, evidence: Evidence) -> Float[Tensor, "b h t"]:
        """Share of the history's queries to which the token was important."""
        counts = evidence.keys.new_zeros(evidence.keys.shape[:3], dtype=torch.float32)
        for block in evidence.attention(self.history):
            # A column that is not seen gets exactly 0.
            visible = (block > 0).sum(dim=-1, keepdim=True)
            counts += (block * visible > 1).sum(dim=(2, 3))
        return newest_first(counts / (1 + self.history * evidence.query.shape[2]), evidence, self.recent)
