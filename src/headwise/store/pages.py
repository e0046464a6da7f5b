"""Pages: rows of every (sequence, KV head), exact ones or codes -> pages that hold them and nothing else.

Rows of a head may lie in any order: keys carry their rotary position and every row knows its column. So evicting
is overwriting the row, or moving the last row into the hole; a page that falls empty goes back to the pool.
"""

from __future__ import annotations

import math

import torch

from headwise.kernels import Kernels
from headwise.store.rows import STEP_DTYPE, Rows
from headwise.types import Bool, Float, Int, PageView, Tensor

# The pool grows by this share beyond what is needed, and shrinks when more than twice of it lies free.
_SLACK = 1 / 48


def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory; tests fill it with NaN, so that whoever reads slack is caught."""
    return torch.empty(*shape, dtype=dtype, device=device)


class PagedStore:
    """Ragged rows of one layer in pages of `page_size` rows.

    Args:
        batch, heads: sequences and KV heads.
        key_dim, value_dim: head dimensions.
        dtype, device: of keys and values.
        page_size: rows in a page.
        scored: whether rows carry an accumulated score.
        steps: numbers beside each key and each value by which its codes are read; None where rows are no codes.
    """

    def __init__(
        self,
        *,
        batch: int,
        heads: int,
        key_dim: int,
        value_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        page_size: int,
        scored: bool,
        steps: tuple[int, int] | None = None,
    ) -> None:
        self.page_size = page_size
        self.keys = empty(0, page_size, key_dim, dtype=dtype, device=device)
        self.values = empty(0, page_size, value_dim, dtype=dtype, device=device)
        self.columns = empty(0, page_size, dtype=torch.int32, device=device)
        self.scores = empty(0, page_size, dtype=torch.float32, device=device) if scored else None
        self.key_steps, self.value_steps = (
            None if steps is None else empty(0, page_size, count, dtype=STEP_DTYPE, device=device)
            for count in steps or (0, 0)
        )
        self.table = torch.full((batch, heads, 0), -1, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(batch, heads, dtype=torch.long, device=device)
        # No head is longer; exact but for padding columns, which are appended to no head.
        self.longest = 0
        # Rows that every head can still take in without another page, as far as is known without asking the device.
        self._room = 0
        # While frozen no memory is given back, so that what a captured step reads and writes stays in its place.
        self.frozen = False
        self._free: list[int] = []

    @classmethod
    def like(cls, rows: Rows, *, page_size: int, scored: bool) -> PagedStore:
        """An empty store for rows of that kind."""
        coded = rows.key_steps is not None and rows.value_steps is not None
        return cls(
            batch=rows.keys.shape[0],
            heads=rows.keys.shape[1],
            key_dim=rows.keys.shape[-1],
            value_dim=rows.values.shape[-1],
            dtype=rows.keys.dtype,
            device=rows.keys.device,
            page_size=page_size,
            scored=scored,
            steps=(rows.key_steps.shape[-1], rows.value_steps.shape[-1]) if coded else None,  # type: ignore[union-attr]  # as tested
        )

    # What it holds.

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.keys.device

    @property
    def row_bytes(self) -> int:
        """Bytes of one row: key, value, column and, where kept, score and steps."""
        return sum(math.prod(pool.shape[2:]) * pool.element_size() for pool in self.pools())

    @property
    def used_bytes(self) -> int:
        """Bytes of the kept rows."""
        return int(self.lengths.sum()) * self.row_bytes

    def tensors(self) -> list[Tensor]:
        """Every tensor it holds on to."""
        return [*self.pools(), self.table, self.lengths]

    def view(self) -> PageView:
        """What a decode kernel reads, but for how codes are read."""
        return PageView(self.keys, self.values, self.columns, self.scores, self.table, self.lengths, self.longest)

    def pools(self) -> list[Tensor]:
        """What its pages hold, one tensor for each part of a row: keys, values, columns, then what else there is."""
        pools = [self.keys, self.values, self.columns, self.scores, self.key_steps, self.value_steps]
        return [pool for pool in pools if pool is not None]

    def kept_columns(self) -> Int[Tensor, "b h n"]:
        """Column of every row, padded to the longest head; undefined where `occupied` is False."""
        return self._spread(self.columns)

    def kept_scores(self) -> Float[Tensor, "b h n"] | None:
        """Score of every row, padded to the longest head; undefined where `occupied` is False."""
        return None if self.scores is None else self._spread(self.scores)

    def occupied(self) -> Bool[Tensor, "b h n"]:
        """True for the rows below each head's length, over as many as the longest head has."""
        return torch.arange(self.longest, device=self.device) < self.lengths[:, :, None]

    def rows(self) -> Rows:
        """A copy of everything kept, side by side."""
        at = self._addresses(self.longest)
        return self._rows_of([pool.flatten(0, 1)[at] for pool in self.pools()], self.occupied())

    def gather(self, named: Bool[Tensor, "b h n"]) -> Rows:
        """A copy of those rows side by side; what pads the shorter heads is 0."""
        counts, at = named.sum(dim=-1, keepdim=True), self._addresses_of(named)
        there = torch.arange(int(counts.max()) if counts.numel() else 0, device=self.device) < counts

        def spread(pool: Tensor) -> Tensor:
            rows = pool.flatten(0, 1)[at]
            where = there if rows.dim() == 1 else there[..., None]
            return rows.new_zeros(*there.shape, *rows.shape[1:]).masked_scatter_(where, rows)

        return self._rows_of([spread(pool) for pool in self.pools()], there)

    # How it changes.

    def add_scores(self, increments: Float[Tensor, "b h n"]) -> None:
        """Add to the scores of the kept rows; increments of rows beyond a head's length are ignored."""
        assert self.scores is not None
        occupied = self.occupied()
        at = self._addresses(self.longest)[occupied]
        self.scores.view(-1)[at] += increments[occupied]

    def fill(self, rows: Rows) -> None:
        """Take in the first rows; of an empty store, the same as `commit`, with less memory in between."""
        assert self.longest == 0
        lengths = rows.keep.sum(dim=-1)
        self.longest = int(lengths.max()) if lengths.numel() else 0
        self._fit(lengths, 0)
        self.lengths.copy_(lengths)
        if self.longest == 0:
            return
        # The first pages of a head lie side by side, so its rows are copied in one piece, without a list of addresses.
        starts = (self.table[:, :, 0].long() * self.page_size).tolist()
        contents = rows.contents(scored=self.scores is not None)
        for b, sequence in enumerate(lengths.tolist()):
            kept = rows.keep[b].nonzero()[:, 1].split(sequence)
            for h, count in enumerate(sequence):
                for pool, content in zip(self.pools(), contents, strict=True):
                    target = pool.flatten(0, 1)[starts[b][h] : starts[b][h] + count]
                    if count == content.shape[2]:
                        target.copy_(content[b, h])
                    elif pool.dtype == content.dtype:
                        torch.index_select(content[b, h], 0, kept[h], out=target)
                    else:
                        target.copy_(content[b, h][kept[h]])

    def append(
        self,
        keys: Float[Tensor, "b h f d"],
        values: Float[Tensor, "b h f e"],
        columns: Int[Tensor, " f"],
        real: Bool[Tensor, "b f"] | None,
        scores: Float[Tensor, "b h f"] | None,
        increments: Float[Tensor, "b h n"] | None,
        kernels: Kernels,
    ) -> None:
        """Take in new rows, in every head the same, and drop nothing.

        Waits for the device only where pages run out, which is once in `page_size` rows.

        Args:
            real: rows to take in; None means all of them.
            scores: of the new rows, where rows carry one.
            increments: to add to the scores of the rows already there.
        """
        count = keys.shape[2]
        if self._room < count:
            self._fit(self.lengths, count + self.page_size - 1)
        kernels.append(self.view(), keys, values, columns, real, scores, increments)
        self.count(count)

    def count(self, appended: int) -> None:
        """Take note of rows that were appended to every head."""
        self._room -= appended
        self.longest = min(self.longest + appended, self.table.shape[-1] * self.page_size)

    def reserve(self, rows: int) -> None:
        """Take pages, so that `append` can take in so many rows without any other."""
        self._fit(self.lengths, rows)

    def drop(self, keep: Bool[Tensor, "b h n"], spare: int = 0) -> None:
        """Keep the rows named by `keep`: the last ones of each head move into the holes that the others leave.

        Args:
            spare: rows per head that are going to be appended, for which pages are kept.
        """
        survivors = keep & self.occupied()
        lengths = survivors.sum(dim=-1)
        beyond = torch.arange(self.longest, device=self.device) >= lengths[:, :, None]
        # Listed head by head, and every head has as many of the one as of the other.
        moved, holes = self._addresses_of(survivors & beyond), self._addresses_of(~(survivors | beyond))
        if len(moved):
            for pool in self.pools():
                flat = pool.flatten(0, 1)
                flat[holes] = flat[moved]
        self.longest = int(lengths.max()) if lengths.numel() else 0
        self._fit(lengths, spare)
        self.lengths.copy_(lengths)

    def commit(self, keep: Bool[Tensor, "b h n"], new: Rows, spare: int = 0) -> None:
        """Keep the rows named by `keep`, drop the others, and take in the new ones that `new.keep` names.

        Nothing is shuffled that need not be: new rows, and the rows beyond a head's new length, fill the holes.

        Args:
            spare: rows per head that are going to be appended, for which pages are kept.
        """
        survivors = keep & self.occupied()
        lengths = survivors.sum(dim=-1) + new.keep.sum(dim=-1)
        longest = int(lengths.max()) if lengths.numel() else 0
        old = torch.arange(self.longest, device=self.device)
        moved = survivors & (old >= lengths[:, :, None])
        held = torch.zeros(*lengths.shape, max(longest, self.longest), dtype=torch.bool, device=self.device)
        held[:, :, : self.longest] = survivors
        holes = (torch.arange(longest, device=self.device) < lengths[:, :, None]) & ~held[:, :, :longest]

        # Sources and holes are listed head by head and every head has as many of the one as of the other.
        moving, taken = moved.any(), new.keep.nonzero(as_tuple=True)
        sources = torch.cat([moved, new.keep], dim=-1).nonzero(as_tuple=True)
        is_new = sources[2] >= self.longest
        from_pages = self._addresses(self.longest)[moved] if moving else None
        pages_moved = [pool.flatten(0, 1)[from_pages] if moving else None for pool in self.pools()]

        self.longest = longest
        self._fit(lengths, spare)
        self.lengths.copy_(lengths)
        targets = self._addresses(longest)[holes]
        contents = new.contents(scored=self.scores is not None)
        for pool, content, rest in zip(self.pools(), contents, pages_moved, strict=True):
            flat = pool.flatten(0, 1)
            flat[targets[is_new]] = content[taken].to(flat.dtype)
            if rest is not None:
                flat[targets[~is_new]] = rest

    def select(self, indices: Int[Tensor, " new"]) -> None:
        """Keep the sequences at `indices`, in that order; pages of one taken several times are copied."""
        chosen = indices.tolist()
        if chosen == list(range(len(self.lengths))):
            return
        indices = indices.to(self.device)
        unused = torch.ones(len(self.lengths), dtype=torch.bool, device=self.device)
        unused[indices] = False
        self._release(self.table[unused])
        table = self.table[indices]
        copies = [row for row, source in enumerate(chosen) if source in chosen[:row]]
        self.table, self.lengths = table, self.lengths[indices]
        self.longest = int(self.lengths.max()) if self.lengths.numel() else 0
        self._room = 0
        if copies:
            again = torch.zeros(len(chosen), dtype=torch.bool, device=self.device)
            again[copies] = True
            shared = again[:, None, None] & (table >= 0)
            sources = table[shared].long()
            self._grow(len(sources))
            pages = torch.tensor(self._take(len(sources)), dtype=torch.long, device=self.device)
            for pool in self.pools():
                pool[pages] = pool[sources]
            self.table = table.masked_scatter(shared, pages.to(torch.int32))
        self._shrink()

    def to(self, device: torch.device) -> None:
        """Move everything to another device."""
        self._set_pools([pool.to(device) for pool in self.pools()])
        self.table, self.lengths = self.table.to(device), self.lengths.to(device)

    # Pages.

    def _set_pools(self, pools: list[Tensor]) -> None:
        self.keys, self.values, self.columns = pools[:3]
        rest = pools[3:]
        if self.scores is not None:
            self.scores = rest.pop(0)
        if rest:
            self.key_steps, self.value_steps = rest

    def _rows_of(self, parts: list[Tensor], keep: Bool[Tensor, "b h n"]) -> Rows:
        keys, values, columns, *rest = parts
        scores = None if self.scores is None else rest.pop(0)
        return Rows(keys, values, columns, scores, keep, *rest)

    def _addresses(self, rows: int) -> Int[Tensor, "b h rows"]:
        """Index of each row in the pool seen as one run of rows; of an arbitrary row where there is none."""
        if rows == 0:
            return self.table.new_zeros(*self.lengths.shape, 0, dtype=torch.long)
        pages = math.ceil(rows / self.page_size)
        starts = self.table[:, :, :pages].long().clamp(min=0) * self.page_size
        at = starts[:, :, :, None] + torch.arange(self.page_size, device=self.device)
        return at.flatten(2)[:, :, :rows]

    def _addresses_of(self, rows: Bool[Tensor, "b h n"]) -> Int[Tensor, " named"]:
        """Indices of the rows named, head by head, in the pool seen as one run of rows."""
        sequence, head, row = rows.nonzero(as_tuple=True)
        pages = self.table[sequence, head, row // self.page_size].long()
        return pages * self.page_size + row % self.page_size

    def _spread(self, pool: Tensor) -> Tensor:
        """Numbers of every row from the pages of each head, padded to the longest head."""
        width = math.ceil(self.longest / self.page_size)
        pages = self.table[:, :, :width].clamp(min=0)
        return pool[pages].flatten(2)[:, :, : self.longest]

    def _fit(self, lengths: Int[Tensor, "b h"], spare: int) -> None:
        """Give back and take pages until every head has just enough for so many rows and `spare` more."""
        needed = (lengths + (spare + self.page_size - 1)) // self.page_size
        width = int(needed.max()) if needed.numel() else 0
        if width > self.table.shape[-1]:
            more = self.table.new_full((*lengths.shape, width - self.table.shape[-1]), -1)
            self.table = torch.cat([self.table, more], dim=-1)
        place = torch.arange(self.table.shape[-1], device=self.device)
        owned = self.table >= 0
        surplus = owned & (place >= needed[:, :, None])
        if surplus.any():
            self._release(self.table[surplus])
            self.table.masked_fill_(surplus, -1)
        wanted = ~owned & (place < needed[:, :, None])
        count = int(wanted.sum())
        if count:
            self._grow(count)
            pages = torch.tensor(self._take(count), dtype=torch.int32, device=self.device)
            self.table.masked_scatter_(wanted, pages)
        self._room = int((needed * self.page_size - lengths).min()) if needed.numel() else 0
        self._shrink()

    def _release(self, pages: Tensor) -> None:
        self._free.extend(page for page in pages.flatten().tolist() if page >= 0)

    def _take(self, count: int) -> list[int]:
        # In ascending order, so that a head's first pages lie side by side.
        taken, self._free = self._free[len(self._free) - count :][::-1], self._free[: len(self._free) - count]
        return taken

    def _grow(self, count: int) -> None:
        """Make sure that many pages are free, growing the pool where they are not."""
        assert not self.frozen or count <= len(self._free)
        missing = count - len(self._free)
        if missing <= 0:
            return
        capacity = len(self.keys)
        # The first filling is exact: a prompt that is never continued pays for no slack.
        grown = capacity + max(missing, math.ceil(capacity * _SLACK))
        self._rebuild(torch.arange(capacity, device=self.device), grown)
        self._free.extend(range(grown - 1, capacity - 1, -1))

    def _shrink(self) -> None:
        """Return memory when more pages lie free than the slack allows."""
        live = len(self.keys) - len(self._free)
        if self.frozen or len(self._free) <= 2 * math.ceil(live * _SLACK):
            return
        owned = self.table >= 0
        pages = self.table[owned].long()
        capacity = live + math.ceil(live * _SLACK)
        self._rebuild(pages, capacity)
        renumbered = torch.arange(live, dtype=torch.int32, device=self.device)
        self.table = torch.full_like(self.table, -1).masked_scatter(owned, renumbered)
        width = int(owned.any(dim=0).any(dim=0).sum())
        self.table = self.table[:, :, :width].clone()
        self._free = list(range(capacity - 1, live - 1, -1))

    def _rebuild(self, pages: Int[Tensor, " live"], capacity: int) -> None:
        """Copy those pages to the front of new pools of that capacity, one pool at a time."""
        pools = self.pools()
        for index, pool in enumerate(pools):
            fresh = empty(capacity, *pool.shape[1:], dtype=pool.dtype, device=pool.device)
            torch.index_select(pool, 0, pages, out=fresh[: len(pages)])
            pools[index] = fresh
            self._set_pools(pools)
