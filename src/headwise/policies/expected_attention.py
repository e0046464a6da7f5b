"""Expected attention: the tokens that future queries are expected to look at."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch

from headwise.errors import ConfigurationError
from headwise.policies.checks import check_count
from headwise.policies.evidence import Evidence
from headwise.policies.registry import register
from headwise.policies.scored import Scored
from headwise.policies.size import Size
from headwise.types import Float, Int, Rotation, Tensor


@register("expected-attention")
@dataclass(frozen=True)
class ExpectedAttention(Scored):
    """Keeps what queries to come should attend to (Devoto et al., 2025, section 3).

    arXiv 2510.00636. Queries before their rotation are taken for normal, with the mean and the covariance of the
    prompt's, and rotated by the mean rotation of the positions to come. The expected attention exp(mu k + k S k / 2)
    follows in closed form; it is normalised over the tokens, averaged over the group and weighted by the norm of the
    value.

    Args:
        keep: tokens per KV head, the sinks among them: a count (int), or a fraction (float).
        future: positions to come that are averaged over.
        sinks: first tokens, which are kept, and whose queries are left out of the statistics.
        epsilon: added to the expected attention before it is weighted: the more, the more the values decide.
    """

    keep: Size
    future: int = 512
    sinks: int = 4
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("future", self.future, 1)
        check_count("sinks", self.sinks, 0)
        if isinstance(self.epsilon, bool) or not isinstance(self.epsilon, int | float) or not 0 <= self.epsilon < inf:
            raise ConfigurationError(f"epsilon must be a number of 0 or more, got {self.epsilon!r}")

    @property
    def needs_rotation(self) -> bool:
        """Queries to come are those of the prompt, turned to other positions."""
        return True

    @property
    def query_rows(self) -> None:
        """All of them."""
        return None

    def score(self, evidence: Evidence) -> Float[Tensor, "b h t"]:
        """Expected attention times the norm of the value."""
        assert evidence.rotation is not None
        # A prompt of sinks alone has no statistics, and needs none.
        mean, covariance = self._future_queries(evidence, evidence.rotation)
        keys, scale = evidence.keys.float()[:, :, None], evidence.options.scaling
        logits = (mean[:, :, :, None] * keys).sum(dim=-1) * scale
        logits = logits + (keys @ covariance * keys).sum(dim=-1) * scale**2 / 2
        if evidence.added is not None:
            logits = logits + evidence.added
        hidden = ~(evidence.real & (evidence.position >= self.sinks))[:, :, None]
        expected = logits.masked_fill(hidden, torch.finfo(torch.float32).min).softmax(dim=-1).mean(dim=2)
        score: Tensor = (expected + self.epsilon) * torch.linalg.vector_norm(evidence.values.float(), dim=-1)
        return score.masked_fill(hidden[:, :, 0], torch.inf)

    def _future_queries(
        self, evidence: Evidence, rotation: Rotation
    ) -> tuple[Float[Tensor, "b h g d"], Float[Tensor, "b h g d d"]]:
        query, counted = evidence.query.float(), evidence.asked & (evidence.query_position >= self.sinks)
        plain = rotation(query.flatten(1, 2), evidence.query_position, True).view_as(query)
        weights = counted[:, None, None, :, None].float()
        total = weights.sum(dim=3).clamp(min=1)
        mean = (plain * weights).sum(dim=3) / total
        centred = (plain - mean[:, :, :, None]) * weights
        covariance = centred.mT @ centred / total[..., None]
        turn = self._mean_rotation(rotation, evidence.length[:, 0], query.shape[-1])
        mean = torch.einsum("bhgd,bde->bhge", mean, turn)
        return mean, torch.einsum("bde,bhgdf,bfi->bhgei", turn, covariance, turn)

    def _mean_rotation(self, rotation: Rotation, length: Int[Tensor, "b 1"], dim: int) -> Float[Tensor, "b d d"]:
        """What a row vector is multiplied with, to turn it to the mean of the positions after the prompt."""
        positions = length + torch.arange(self.future, device=length.device)
        axes = torch.eye(dim, dtype=torch.float32, device=length.device)[None, :, None].expand(
            len(length), -1, self.future, -1
        )
        return rotation(axes, positions, False).mean(dim=2)
