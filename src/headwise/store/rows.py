"""Rows: what heads keep, side by side -> the form in which stores take it in and give it out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from headwise.types import Bool, Float, Int, Tensor


@dataclass
class Rows:
    """Rows of every head side by side: the kept ones, padded to the longest head, or new ones.

    Attributes:
        parts: `[b, h, n, ...]`, by the names of `headwise.store.row_parts`.
        keep: which of the rows count; content of the others is undefined.
    """

    parts: dict[str, Tensor]
    keep: Bool[Tensor, "b h n"]

    @classmethod
    def of(
        cls,
        keys: Float[Tensor, "b h n d"],
        values: Float[Tensor, "b h n e"],
        columns: Int[Tensor, "b h n"],
        scores: Float[Tensor, "b h n"] | None,
        keep: Bool[Tensor, "b h n"],
    ) -> Rows:
        """Exact rows, as attention gives them."""
        parts = {"keys": keys, "values": values, "columns": columns}
        return cls(parts if scores is None else {**parts, "scores": scores}, keep)

    @property
    def keys(self) -> Tensor:
        """Numbers `[b, h, n, d]`, or codes."""
        return self.parts["keys"]

    @property
    def values(self) -> Tensor:
        """Numbers `[b, h, n, e]`, or codes."""
        return self.parts["values"]

    @property
    def columns(self) -> Int[Tensor, "b h n"]:
        """Column of every row."""
        return self.parts["columns"]

    @property
    def scores(self) -> Float[Tensor, "b h n"] | None:
        """Accumulated score of every row, where rows carry one."""
        return self.parts.get("scores")

    @property
    def biases(self) -> Float[Tensor, "b h n"] | None:
        """What is added to the logits of every row, where rows have any."""
        return self.parts.get("biases")

    def cut(self, part: slice) -> Rows:
        """Some of the rows of every head."""
        return Rows({name: content[:, :, part] for name, content in self.parts.items()}, self.keep[:, :, part])

    def naming(self, keep: Bool[Tensor, "b h n"]) -> Rows:
        """The same rows, of which others count."""
        return Rows(self.parts, keep)

    def replacing(self, **parts: Tensor) -> Rows:
        """The same rows with other content of those parts."""
        return Rows({**self.parts, **parts}, self.keep)

    def without(self, *names: str) -> Rows:
        """The same rows without those parts."""
        return Rows({name: content for name, content in self.parts.items() if name not in names}, self.keep)


def side_by_side(sets: Sequence[Rows]) -> Rows:
    """Rows of several sets, of the same parts, as one."""
    if len(sets) == 1:
        return sets[0]
    parts = {name: torch.cat([rows.parts[name] for rows in sets], dim=2) for name in sets[0].parts}
    return Rows(parts, torch.cat([rows.keep for rows in sets], dim=-1))
