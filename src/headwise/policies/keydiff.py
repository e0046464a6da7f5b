"""KeyDiff: the tokens whose keys differ from the rest."""

from __future__ import annotations

from dataclasses import dataclass

from torch.nn import functional

from headwise.policies.evidence import Evidence
from headwise.policies.registry import register
from headwise.policies.scored import Scored
from headwise.policies.size import Size
from headwise.types import Float, Tensor


@register("keydiff")
@dataclass(frozen=True)
class KeyDiff(Scored):
    """Keeps the keys that point away from the mean direction of all keys (Park et al., 2025, section 3.2).

    arXiv 2504.15364. The original reads the prompt in blocks and evicts after each; here it is scored as a whole.

    Args:
        keep: tokens per KV head: a count (int), or a fraction (float).
    """

    keep: Size

    def score(self, evidence: Evidence) -> Float[Tensor, "b h t"]:
        """Minus the cosine between the key and the mean of the normalised keys."""
        keys = evidence.keys.float()
        directions = functional.normalize(keys, dim=-1) * evidence.real[..., None]
        return -functional.cosine_similarity(keys, directions.mean(dim=2, keepdim=True), dim=-1)
