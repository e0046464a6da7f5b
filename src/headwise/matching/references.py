"""References: queries of the prompt -> a sample of them, as if they were asked behind it: what kept rows are fitted to.

A query of the prompt says what the text makes a head look for; where it was asked, it saw only what came before. Turned
to positions behind the prompt it looks for the same from where later tokens will.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch

from headwise.kernels.interface import AttentionMap
from headwise.matching.targets import HeadRows, Targets, targets_of
from headwise.types import Bool, Float, Int, LogitOptions, Rotation, Tensor

# Of so many for each KV head is known what the prompt gives them, once it is known what they look at.
_HELD = 1024

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

    def targets(
        self,
        rotation: Rotation,
        keys: Float[Tensor, "b h t d"],
        values: Float[Tensor, "b h t e"],
        positions: Int[Tensor, "b t"],
        real: Bool[Tensor, "b t"],
        gates: Float[Tensor, "h g"] | None = None,
        marks: Float[Tensor, "b t"] | None = None,
    ) -> dict[tuple[int, int], Targets]:
        """What the whole prompt gives them behind it, by sequence and KV head.

        Args:
            rotation: the layer's rotary embedding.
            keys, values: of the whole prompt.
            positions, real: of every column, the latter False for padding.
            gates, marks: what is added to the logits where attention is steered, of query heads and of columns.
        """
        query, found = self.behind(rotation, positions, real.sum(dim=1)), {}
        for b, h in product(range(keys.shape[0]), range(keys.shape[1])):
            asked = query[b, h][:, self.counted[b]]
            sinks = self.options.sinks
            sink = None if sinks is None else sinks[h].float()[:, None].expand(asked.shape[:2]).flatten()
            own = None if marks is None else marks[b][real[b]]
            rows = HeadRows(keys[b, h][real[b]].float(), values[b, h][real[b]].float(), marks=own)
            gate = None if gates is None else gates[h][:, None].expand(asked.shape[:2]).flatten()
            found[b, h] = targets_of(asked.flatten(0, 1), sink, rows, self.options, gate).at_most(_HELD)
        return found

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
