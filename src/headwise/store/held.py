"""Held: pages of exact rows, and of codes in several formats -> one run of rows per head, as every stage sees them.

The exact rows come first, then those of each format, each part padded to its longest head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from headwise.kernels.interface import PageView
from headwise.quant.codes import span
from headwise.store.coded import CodedPages, with_steps
from headwise.store.pages import PagePool
from headwise.store.rows import Rows, side_by_side
from headwise.types import Bool, Float, Int, Tensor


class HeldRows:
    """What a store holds.

    Attributes:
        exact: rows as numbers.
        coded: older ones, by format.
        formats: which format each head's rows get, -1 for staying exact.
    """

    exact: PagePool
    coded: Sequence[CodedPages]
    formats: Int[Tensor, "b h"]

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.exact.device

    @property
    def frozen(self) -> bool:
        """Whether a step over it is captured."""
        return self.exact.pages.frozen

    @property
    def heads(self) -> tuple[int, int, int, int]:
        """Sequences, KV heads, and channels of a key and of a value."""
        batch, heads = self.exact.lengths.shape
        return batch, heads, self.exact.pools["keys"].shape[-1], self.value_dim

    @property
    def value_dim(self) -> int:
        """Head dimension of values."""
        return self.exact.pools["values"].shape[-1]

    @property
    def lengths(self) -> Int[Tensor, "b h"]:
        """Rows of every head."""
        return self.exact.lengths + sum(part.pool.lengths for part in self.coded)

    @property
    def longest(self) -> int:
        """Over how many rows a head's are spread, where those of all heads lie side by side."""
        exact = self.exact.longest
        return exact + sum(part.pool.longest for part in self.coded) if self.coded else exact

    @property
    def used_bytes(self) -> int:
        """Bytes of the kept rows."""
        return sum(pool.used_bytes for pool in self._pools)

    @property
    def row_bytes(self) -> tuple[int, ...]:
        """What an exact row takes, and one in each format."""
        return tuple(pool.row_bytes for pool in self._pools)

    def row_formats(self) -> Int[Tensor, " n"]:
        """Format of each row of a head, -1 for an exact one."""
        lengths = self.exact.lengths
        return _along([lengths.new_full((pool.longest,), at) for at, pool in enumerate(self._pools, start=-1)])

    def tensors(self) -> list[Tensor]:
        """Every tensor it holds on to."""
        return [tensor for pool in self._pools for tensor in pool.tensors()] + [self.formats]

    def view(self) -> list[PageView]:
        """What a kernel reads: the exact rows, then those of each format that has any.

        While frozen, heads are taken to be as long as their pages have room: how long they are, only the device knows.
        """
        views = self.held_view()
        return [replace(view, longest=view.capacity) for view in views] if self.frozen else views

    def held_view(self) -> list[PageView]:
        """The same over as many rows as there are when it is called, in the order of `rows`."""
        return [self.exact.view(), *[part.view() for part in self.coded if part.pool.longest]]

    def kept_columns(self) -> Int[Tensor, "b h n"]:
        """Column of every row; undefined where `occupied` is False."""
        columns = self._kept("columns")
        assert columns is not None
        return columns

    def kept_scores(self) -> Float[Tensor, "b h n"] | None:
        """Score of every row; undefined where `occupied` is False."""
        return self._kept("scores")

    def occupied(self) -> Bool[Tensor, "b h n"]:
        """True where there is a row."""
        return _along([pool.occupied() for pool in self._pools])

    def rows(self, *names: str) -> Rows:
        """A copy of everything kept, side by side, as numbers; or of those parts of it."""
        coded = [part.decode(part.pool.rows(*with_steps(names))) for part in self.coded]
        return side_by_side([self.exact.rows(*names), *coded])

    def spans(self) -> tuple[Float[Tensor, "b h n"], Float[Tensor, "b h n"]]:
        """How far the numbers of each key, and of each value, lie apart, rotated as codes are."""
        numbers = [self.exact.kept(name) for name in ("keys", "values")]
        exact = [span(rows) for rows in numbers if rows is not None]
        keys, values = zip(exact, *(part.spans() for part in self.coded), strict=True)
        return _along(list(keys)), _along(list(values))

    def gather(self, named: Bool[Tensor, "b h n"], *names: str) -> Rows:
        """A copy of those rows side by side, as numbers, or of those parts of them; what pads shorter heads is 0."""
        exact, *coded = self._cut(named)
        read = with_steps(names)
        gathered = [part.decode(part.pool.gather(own, *read)) for part, own in zip(self.coded, coded, strict=True)]
        return side_by_side([self.exact.gather(exact, *names), *gathered])

    # Its parts.

    @property
    def _pools(self) -> list[PagePool]:
        return [self.exact, *(part.pool for part in self.coded)]

    def _kept(self, part: str) -> Tensor | None:
        held = [rows for pool in self._pools if (rows := pool.kept(part)) is not None]
        return _along(held) if held else None

    def _cut(self, along: Tensor, dim: int = -1) -> list[Any]:
        """A tensor over the rows of all parts, part by part."""
        return list(along.split([pool.longest for pool in self._pools], dim=dim)) if self.coded else [along]


def _along(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
