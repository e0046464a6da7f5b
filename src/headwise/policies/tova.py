"""TOVA: the tokens that the last token looks at."""

from __future__ import annotations

from dataclasses import dataclass

from headwise.policies.evidence import Evidence
from headwise.policies.registry import register
from headwise.policies.scored import Scored, newest_first
from headwise.policies.size import Size
from headwise.types import Float, Tensor


@register("tova")
@dataclass(frozen=True)
class TOVA(Scored):
    """Keeps what the last token of the prompt attends to, the same in every head of a layer (Oren et al., 2024).

    arXiv 2401.06104, section 3.2: the attention is averaged over all heads. The original evicts after every token; here
    it is chosen again after `choose_every`. The last token itself is kept in any case.

    Args:
        keep: tokens per KV head: a count (int), or a fraction (float).
    """

    keep: Size

    @property
    def query_rows(self) -> int:
        """The last."""
        return 1

    def score(self, evidence: Evidence) -> Float[Tensor, "b h t"]:
        """Mean attention of the last token over the heads of the layer."""
        votes = evidence.mean_attention(1).mean(dim=2)
        if evidence.position.shape[1] == 1:
            score = votes.mean(dim=1, keepdim=True).expand_as(votes)
        else:
            # Rows of different heads lie at different places, and need not be of the same tokens.
            at = evidence.position.flatten(1)
            tokens = votes.new_zeros(len(votes), int(evidence.length.max()))
            given = tokens.scatter_add_(1, at, votes.flatten(1)) / votes.shape[1]
            score = given.gather(1, at).view_as(votes)
        return newest_first(score, evidence, 1)
