"""Rows: what heads keep, side by side -> the form in which stores take it in and give it out."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from headwise.types import Bool, Float, Int, Tensor, UInt8

# Of what codes are read by.
STEP_DTYPE = torch.float16

# Beside key and value, in any format: the column.
COLUMN_BYTES = torch.int32.itemsize


@dataclass
class Rows:
    """Rows of every head side by side: the kept ones, padded to the longest head, or new ones.

    `keep` says which of them count. Content of the other rows is undefined. Keys and values are numbers, or codes with
    the steps to read them by.
    """

    keys: Float[Tensor, "b h n d"] | UInt8[Tensor, "b h n kc"]
    values: Float[Tensor, "b h n e"] | UInt8[Tensor, "b h n vc"]
    columns: Int[Tensor, "b h n"]
    scores: Float[Tensor, "b h n"] | None
    keep: Bool[Tensor, "b h n"]
    key_steps: Float[Tensor, "b h n ks"] | None = None
    value_steps: Float[Tensor, "b h n vs"] | None = None

    def cut(self, part: slice) -> Rows:
        """Some of the rows of every head."""
        scores = None if self.scores is None else self.scores[:, :, part]
        steps = (None if steps is None else steps[:, :, part] for steps in (self.key_steps, self.value_steps))
        keys, values, columns = (content[:, :, part] for content in (self.keys, self.values, self.columns))
        return Rows(keys, values, columns, scores, self.keep[:, :, part], *steps)

    def contents(self, *, scored: bool = True) -> list[Tensor]:
        """What there is of them beside `keep`, in the order of a store's pools.

        Args:
            scored: whether the store has a pool for scores.
        """
        scores = self.scores if scored else None
        parts = [self.keys, self.values, self.columns, scores, self.key_steps, self.value_steps]
        return [part for part in parts if part is not None]
