"""Steered: the layers of a cache, and what is marked -> which heads are steered, how, and to which tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from headwise.stages.layer import LayerCache
from headwise.stages.marks import ColumnMarks
from headwise.types import Bool, Tensor


@dataclass(frozen=True)
class Steered:
    """How a cache is steered.

    Attributes:
        how: the way, as Python would build it, but for its heads.
        heads: query heads by layer.
        spans: of every sequence the ranges of tokens that are marked, from and up to, padding counted.
    """

    how: str
    heads: dict[int, list[int]]
    spans: list[list[tuple[int, int]]]

    @classmethod
    def of(cls, cores: Sequence[LayerCache], marks: ColumnMarks) -> Steered | None:
        """Of a cache's compressed layers; None where nothing is steered."""
        if marks.how is None:
            return None
        heads = {}
        for core in cores:
            if core.config.steering is not None:
                heads[core.index] = core.config.steering.gates.flatten().nonzero().flatten().tolist()
        spans = [] if marks.pinned is None else [_ranges(row) for row in marks.pinned]
        return cls(marks.how, heads, spans)

    @property
    def words(self) -> str:
        """For people."""
        heads, tokens = sum(map(len, self.heads.values())), [sum(b - a for a, b in own) for own in self.spans]
        marked = ", ".join(f"{count:,}" for count in tokens) or "no"
        return f"{heads} heads of {len(self.heads)} layers to {marked} tokens, {self.how}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        heads = {str(layer): own for layer, own in self.heads.items()}
        return {"how": self.how, "heads": heads, "spans": [[list(each) for each in own] for own in self.spans]}


def _ranges(marked: Bool[Tensor, " m"]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for column in marked.nonzero().flatten().tolist():
        start = found.pop()[0] if found and found[-1][1] == column else column
        found.append((start, column + 1))
    return found
