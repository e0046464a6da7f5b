"""Steered: what kernels are asked of one layer, and marks of columns -> the same request with the marks in it.

Nothing is added where a layer has no head that is steered, or nothing is marked.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from headwise.kernels.attention import dense_attention
from headwise.kernels.interface import AttentionMap, DecodeRequest, Kernels, Marks
from headwise.stages.marks import ColumnMarks
from headwise.steer.steering import LayerSteering
from headwise.types import Bool, Float, Int, Tensor

# By how much logits of what is marked are raised to see its share of the attention.
_RAISED = 1e4
_LOG_RAISED = math.log(_RAISED)


class LayerMarks:
    """The marks of one layer.

    Args:
        steering: of the layer; None where none of its heads is steered.
        columns: shared by all layers.
    """

    def __init__(self, steering: LayerSteering | None, columns: ColumnMarks) -> None:
        self._steering, self._columns = steering, columns

    @property
    def any(self) -> bool:
        """Whether any of its queries is steered."""
        return self._steering is not None and self._columns.values is not None

    def attended(self, map: AttentionMap) -> AttentionMap:
        """A map of the first columns, to attend by."""
        if self._steering is None or (marks := self._of_map(self._steering, map)) is None:
            return map
        if self._steering.target is not None:
            share = marked_share(map, marks.columns != 0)
            marks = replace(marks, gates=marks.gates * _missing(share, self._steering.target))
        return replace(map, marks=marks)

    def profiled(self, map: AttentionMap) -> AttentionMap:
        """A map of the first columns, as policies look at it."""
        if self._steering is None or not self._steering.profiled:
            return map
        marks = self._of_map(self._steering, map)
        return map if marks is None else replace(map, marks=marks)

    def evidence(
        self, columns: Int[Tensor, "b k n"]
    ) -> tuple[Float[Tensor, "h g"] | None, Float[Tensor, "b k n"] | None]:
        """Gates of the query heads and marks of those columns, as policies look at them; None where they do not."""
        return self.added(columns) if self._steering is not None and self._steering.profiled else (None, None)

    def added(self, columns: Int[Tensor, "b k n"]) -> tuple[Float[Tensor, "h g"] | None, Float[Tensor, "b k n"] | None]:
        """The same as they are attended by, whatever policies look at; not where gates depend on the query."""
        if self._steering is None or not self.any:
            return None, None
        assert self._steering.target is None
        return self._steering.gates, self._columns.at(columns)

    def of_columns(self, seen: int) -> tuple[Float[Tensor, "h g"] | None, Float[Tensor, "b m"] | None]:
        """The same with the marks of all columns that have come."""
        if self._steering is None or not self._steering.profiled or (marks := self._columns.between(0, seen)) is None:
            return None, None
        return self._steering.gates, marks

    def decode(self, request: DecodeRequest, kernels: Kernels, fresh: Float[Tensor, "b f"] | None) -> DecodeRequest:
        """A request over rows.

        Args:
            fresh: marks of the fresh rows.
        """
        values = self._columns.values
        if self._steering is None or values is None:
            return request
        marks = Marks(_expanded(self._steering, request.query), values, fresh)
        if self._steering.target is not None:
            bare = replace(request, with_mass=False)
            raised = replace(marks, columns=values * _LOG_RAISED, fresh=None if fresh is None else fresh * _LOG_RAISED)
            before, after = (kernels.ragged_decode(each).lse for each in (bare, replace(bare, marks=raised)))
            share = (after - before).expm1() / (_RAISED - 1)
            marks = replace(marks, gates=marks.gates * _missing(share, self._steering.target))
        return replace(request, marks=marks)

    def fresh(self, first: int, stop: int) -> Float[Tensor, "b f"] | None:
        """Marks of fresh rows in those columns; None where nothing of it is steered."""
        return self._columns.between(first, stop) if self.any else None

    def _of_map(self, steering: LayerSteering, map: AttentionMap) -> Marks | None:
        values = self._columns.between(0, map.keys.shape[2])
        return None if values is None else Marks(_expanded(steering, map.query), values)


def marked_share(map: AttentionMap, marked: Bool[Tensor, "b t"]) -> Float[Tensor, "b h g q"]:
    """Share of the attention of every query that marked columns get: attention to values that are 1 there.

    As many channels as keys have, of which one would do: fused attention takes no others.
    """
    ones = marked[:, None, :, None].to(map.keys.dtype).expand(map.keys.shape).contiguous()
    return dense_attention(map, ones)[..., 0].float()


def _expanded(steering: LayerSteering, query: Float[Tensor, "b h g q d"]) -> Float[Tensor, "b h g q"]:
    return steering.gates[None, :, :, None].expand(query.shape[:4])


def _missing(share: Float[Tensor, "b h g q"], target: float) -> Float[Tensor, "b h g q"]:
    """The logarithm of the factor by which what is marked falls short of its share (SpotLight, arXiv 2505.12025)."""
    missing = (target / share.clamp(min=torch.finfo(torch.float32).tiny)).log().clamp(min=0)
    # Where a query sees nothing of it, there is nothing to raise.
    return missing.where(share > 0, 0)
