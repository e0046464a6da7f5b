"""Newest: queries of every pass -> the newest of them, in a ring of fixed size, for the next choice to look at."""

from __future__ import annotations

import torch

from headwise.types import Bool, Float, Int, LogitOptions, Tensor


class NewestQueries:
    """The newest queries of one layer, or one of so many that follow one another.

    Columns are counted in strides, one of which begins behind the prompt, so that padding in it changes nothing; the
    query of one lies at the number of its stride, modulo the ring's size. The same memory is written in every step, so
    that a step can be captured.

    Args:
        size: queries of each head.
        stride: columns of which the query of the last is held.

    Attributes:
        options: how the model makes logits of them; None before the first.
        before: columns that the stride of the first one is short of.
    """

    def __init__(self, size: int, stride: int = 1) -> None:
        self._size, self._stride = size, stride
        self.reset()

    def reset(self) -> None:
        """Forget all."""
        self.options: LogitOptions | None = None
        self.before = 0
        self._query: Float[Tensor, "b h g s d"] | None = None
        # Which column's query lies where; -1 for none.
        self._columns: Int[Tensor, " s"] | None = None

    def begin_behind(self, prompt: int) -> None:
        """Let a stride begin behind so many columns."""
        self.before = -prompt % self._stride

    def put(self, query: Float[Tensor, "b h g q d"], columns: Int[Tensor, " q"], options: LogitOptions) -> None:
        """Take in the queries of some columns, which follow one another."""
        self.options = options
        # Backwards from the newest, so that no two lie at the same place.
        count = query.shape[3]
        first = max((count - 1) % self._stride, count - 1 - (self._size - 1) * self._stride)
        taken = slice(first, None, self._stride)
        query, columns = query[:, :, :, taken], columns[taken].long()
        if self._query is None or self._columns is None:
            batch, heads, group, _, dim = query.shape
            self._query = query.new_zeros(batch, heads, group, self._size, dim)
            self._columns = torch.full((self._size,), -1, dtype=torch.long, device=query.device)
        if self._size:
            at = (columns + self.before) // self._stride % self._size
            self._query.index_copy_(3, at, query.to(self._query.dtype))
            self._columns.index_copy_(0, at, columns)

    def of(self, seen: int, since: int = 0) -> tuple[Float[Tensor, "b h g s d"], Int[Tensor, " s"], Bool[Tensor, " s"]]:
        """Queries of the newest of so many columns, in order, these columns, and whether the query of each is there.

        Args:
            since: columns before which no query is asked for.
        """
        assert self._query is not None and self._columns is not None
        first, last = (since + self.before) // self._stride, -(-(seen + self.before) // self._stride)
        wanted = torch.arange(max(last - self._size, first), last, device=self._columns.device)
        at = wanted % max(1, self._size)
        columns = self._columns[at]
        there = ((columns + self.before) // self._stride == wanted) & (columns >= since) & (columns < seen)
        return self._query[:, :, :, at], columns.where(there, 0), there

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

    def restore(self, state: dict[str, Tensor], before: int) -> None:
        """Take back what `state` gave, and `before`; `options` come with the next pass."""
        self._query, self._columns = state.get("newest_queries"), state.get("newest_columns")
        self.before = before
