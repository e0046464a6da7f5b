"""Prompt mass: passes of a prompt -> what every column has got from them, where the policy looks at it."""

from __future__ import annotations

import torch

from headwise.kernels.interface import AttentionMap
from headwise.stages.config import LayerConfig
from headwise.stages.mass_profile import (
    MassProfile,
    RowWeights,
    attend_and_profile,
    distinct_widths,
    profile_mass,
    row_weights,
)
from headwise.stages.token_log import TokenLog
from headwise.types import Float, Int, Tensor


class PromptMass:
    """The attention mass of one layer's prompt.

    Args:
        config: of the layer.
        log: of the tokens, shared by all layers.

    Attributes:
        profile: of all passes so far; None where there is none.
        rows_read: query rows that it has read.
    """

    def __init__(self, config: LayerConfig, log: TokenLog) -> None:
        self._config, self._log = config, log
        self.profile: MassProfile | None = None
        self.rows_read = 0

    @property
    def looked_at(self) -> bool:
        """Whether the policy chooses or ranks by it."""
        policy = self._config.policy
        return policy.selection is not None or "score" in policy.facts

    def attend(
        self, map: AttentionMap, values: Float[Tensor, "b h t e"]
    ) -> tuple[Float[Tensor, "b h g q e"], MassProfile]:
        """Attention of the newest columns, and the mass to tell `add` of, once they are in for good."""
        return attend_and_profile(map, values, *self._question(map), self._config.cache.kernels)

    def add(self, map: AttentionMap, known: MassProfile | None) -> None:
        """Take in the newest columns.

        Args:
            known: the mass of this very map, where `attend` gave it.
        """
        new = known or profile_mass(map, *self._question(map), self._config.cache.kernels)
        self.rows_read += new.rows_read
        self.profile = new if self.profile is None else self.profile + new

    def _question(self, map: AttentionMap) -> tuple[RowWeights, Int[Tensor, "b t"], list[Int[Tensor, " b"]]]:
        """How much each of the newest columns counts, the positions of all, and the widths of bands."""
        count, seen, batch, device = map.query.shape[3], map.keys.shape[2], len(map.keys), map.keys.device
        columns = torch.arange(seen, device=device).expand(batch, 1, -1)
        positions, real = self._log.positions(columns)[:, 0], self._log.real(columns)[:, 0]
        # What has not come in yet is taken to hold no padding.
        to_come = max(0, (self._config.cache.prompt_columns or 0) - seen)
        prompt = self._log.real_tokens(batch, seen, device) + to_come
        weights = row_weights(self._config.policy, positions[:, -count:], real[:, -count:], prompt)
        return weights, positions, distinct_widths(self._config.policy, prompt)
