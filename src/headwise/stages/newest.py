"""Newest: queries of every pass -> the newest of them, in a ring of fixed size, for the next choice to look at."""

from __future__ import annotations

import torch

from headwise.types import Bool, Float, Int, LogitOptions, Tensor


class NewestQueries:
    """The newest queries of one layer; that of column c lies at c modulo the ring's size.

    The same memory is written in every step, so that a step can be captured.

    Args:
        size: queries of each head.

    Attributes:
        options: how the model makes logits of them; None before the first.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self.reset()

    def reset(self) -> None:
        """Forget all."""
        self.options: LogitOptions | None = None
        self._query: Float[Tensor, "b h g s d"] | None = None
        # Which column's query lies where; -1 for none.
        self._columns: Int[Tensor, " s"] | None = None

    def put(self, query: Float[Tensor, "b h g q d"], columns: Int[Tensor, " q"], options: LogitOptions) -> None:
        """Take in the queries of some columns, which follow one another."""
        self.options = options
        first = max(0, query.shape[3] - self._size)
        query, columns = query[:, :, :, first:], columns[first:].long()
        if self._query is None or self._columns is None:
            batch, heads, group, _, dim = query.shape
            self._query = query.new_zeros(batch, heads, group, self._size, dim)
            self._columns = torch.full((self._size,), -1, dtype=torch.long, device=query.device)
        if self._size:
            at = columns % self._size
            self._query.index_copy_(3, at, query.to(self._query.dtype))
            self._columns.index_copy_(0, at, columns)

    def of(self, seen: int) -> tuple[Float[Tensor, "b h g s d"], Int[Tensor, " s"], Bool[Tensor, " s"]]:
        """Queries of the newest of so many columns, in order, these columns, and whether the query of each is there."""
        assert self._query is not None and self._columns is not None
        wanted = torch.arange(seen - self._size, seen, device=self._columns.device)
        at = wanted % max(1, self._size)
        return self._query[:, :, :, at], wanted.clamp(min=0), (self._columns[at] == wanted) & (wanted >= 0)

    def select(self, indices: Int[Tensor, " new"]) -> None:
        """Keep the sequences at `indices`, in that order."""
        if self._query is not None:
            self._query = self._query[indices.to(self._query.device)]

    def to(self, device: torch.device) -> None:
        """Move everything to another device."""
        if self._query is not None and self._columns is not None:
            self._query, self._columns = self._query.to(device), self._columns.to(device)

    def state(self) -> dict[str, Tensor]:
        """Every tensor it holds on to, by name; what `restore` needs."""
        if self._query is None or self._columns is None:
            return {}
        return {"newest_queries": self._query, "newest_columns": self._columns}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` gave; `options` come with the next pass."""
        self._query, self._columns = state.get("newest_queries"), state.get("newest_columns")
