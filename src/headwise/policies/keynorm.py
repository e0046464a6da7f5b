"""Key norm: the tokens whose keys are short."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from headwise.policies.evidence import Evidence
from headwise.policies.registry import register
from headwise.policies.scored import Scored
from headwise.policies.size import Size
from headwise.types import Float, Tensor


@register("keynorm")
@dataclass(frozen=True)
class KeyNorm(Scored):
    """Keeps the keys with the smallest L2 norm, which tend to be attended to (Devoto et al., EMNLP 2024, section 3).

    arXiv 2406.11430. The original leaves the first two layers alone; here every layer is compressed.

    Args:
        keep: tokens per KV head: a count (int), or a fraction (float).
    """

    keep: Size

    def score(self, evidence: Evidence) -> Float[Tensor, "b h t"]:
        """Minus the norm."""
        norm: Tensor = torch.linalg.vector_norm(evidence.keys.float(), dim=-1)
        return -norm
