"""References: queries of the prompt -> a sample of them, as if they were asked behind it: what kept rows are fitted to.

A query of the prompt says what the text makes a head look for; where it was asked, it saw only what came before. Turned
to positions behind the prompt it looks for the same from where later tokens will.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from headwise.kernels.attention import logits_of, probabilities, query_blocks
from headwise.kernels.interface import AttentionMap
from headwise.types import Bool, Float, Int, LogitOptions, Rotation, Tensor

# Positions behind the prompt over which references are spread.
_AHEAD = 256


@dataclass(frozen=True)
class References:
    """Some queries of the heads of one layer.

    Attributes:
        query: in the model's dtype, at their own positions.
        columns: of these queries.
        counted: which of them are of a real token.
        options: how the model makes logits.
    """

    query: Float[Tensor, "b h g r d"]
    columns: Int[Tensor, " r"]
    counted: Bool[Tensor, "b r"]
    options: LogitOptions

    def tensors(self) -> list[Tensor]:
        """Every tensor it holds on to."""
        return [self.query, self.columns, self.counted]

    def __add__(self, later: References) -> References:
        return References(
            torch.cat([self.query, later.query], dim=3),
            torch.cat([self.columns, later.columns]),
            torch.cat([self.counted, later.counted], dim=1),
            later.options,
        )

    def behind(
        self, rotation: Rotation, positions: Int[Tensor, "b t"], length: Int[Tensor, " b"]
    ) -> Float[Tensor, "b h g r d"]:
        """The queries in fp32, as if asked behind the prompt.

        Args:
            rotation: the layer's rotary embedding.
            positions: of every column of the prompt.
            length: of each sequence, in real tokens.
        """
        at = positions[:, self.columns]
        plain = rotation(self.query.float().flatten(1, 2), at, True)
        return rotation(plain, length[:, None] + at % _AHEAD, False).view(self.query.shape)


def peaks(
    query: Float[Tensor, "b h g r d"], references: References, keys: Float[Tensor, "b h t d"], real: Bool[Tensor, "b t"]
) -> Float[Tensor, "b h t"]:
    """The most that any of the references gives each row of the prompt; 0 for padding.

    Args:
        query: of the references, behind the prompt.
        real: False for padding.
    """
    visible = (references.counted[:, :, None] & real[:, None, :])[:, None, None]
    best = torch.zeros(*keys.shape[:3], dtype=torch.float32, device=keys.device)
    for block in query_blocks(query, keys.shape[2]):
        logits = logits_of(query[:, :, :, block], keys, references.options)
        given = probabilities(logits, visible[:, :, :, block], references.options)
        best = best.maximum(given.amax(dim=(2, 3)))
    return best


def sampled(map: AttentionMap, step: int) -> References:
    """Every so many of the newest queries, counted from the first column: parts of a prompt give what the whole would.

    Args:
        step: one query is taken of so many.
    """
    batch, queries, device = len(map.query), map.query.shape[3], map.query.device
    first = map.keys.shape[2] - queries
    at = torch.arange(queries, device=device)[(step // 2 - first) % step :: step]
    columns, counted = at + first, torch.ones(batch, len(at), dtype=torch.bool, device=device)
    if map.mask is not None:
        # A query that does not see itself is padding.
        counted = map.mask[:, at].gather(2, columns[None, :, None].expand(batch, -1, 1))[..., 0]
    return References(map.query[:, :, :, at], columns, counted, map.options)
