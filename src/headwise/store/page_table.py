"""Page table: how many rows every head has -> which pages are whose; pages are taken as they are needed and given back.

It owns no rows: `resize` is called where the pool that holds them must grow or may shrink.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from headwise.types import Bool, Int, Tensor

# The pool grows by this share beyond what is needed, and shrinks when more than twice of it lies free.
_SLACK = 1 / 48


class PageTable:
    """Pages of every (sequence, KV head) of one layer.

    Args:
        batch, heads: sequences and KV heads.
        page_size: rows in a page.
        resize: makes a pool of so many pages, with those named at its front, in that order.

    Attributes:
        entries: number of each page, -1 where there is none.
        lengths: rows of every head.
        longest: no head is longer; exact but for padding columns, which are appended to no head.
        capacity: pages in the pool.
        frozen: while it is, no memory is given back, so that what a captured step reads and writes stays in its place.
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        page_size: int,
        device: torch.device,
        resize: Callable[[Int[Tensor, " live"], int], None],
    ) -> None:
        self.page_size = page_size
        self.entries = torch.full((batch, heads, 0), -1, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(batch, heads, dtype=torch.long, device=device)
        self.longest = self.capacity = 0
        self.frozen = False
        self._resize = resize
        # Rows that every head can still take in without another page, as far as is known without asking the device.
        self._room = 0
        self._free: list[int] = []

    @property
    def device(self) -> torch.device:
        """Where the table is, and the rows."""
        return self.lengths.device

    def occupied(self) -> Bool[Tensor, "b h n"]:
        """True for the rows below each head's length, over as many as the longest head has."""
        return torch.arange(self.longest, device=self.device) < self.lengths[:, :, None]

    # Where rows lie.

    def addresses(self, rows: int) -> Int[Tensor, "b h rows"]:
        """Index of each row in the pool seen as one run of rows; of an arbitrary row where there is none."""
        if rows == 0:
            return self.entries.new_zeros(*self.lengths.shape, 0, dtype=torch.long)
        starts = self._pages(rows).long() * self.page_size
        at = starts[:, :, :, None] + torch.arange(self.page_size, device=self.device)
        return at.flatten(2)[:, :, :rows]

    def behind(self, count: int) -> Int[Tensor, "b h count"]:
        """Indices of the next rows of every head, for which it must have pages, in the pool seen as one run of rows."""
        row = self.lengths[:, :, None] + torch.arange(count, device=self.device)
        return self.entries.gather(2, row // self.page_size).long() * self.page_size + row % self.page_size

    def addresses_of(self, rows: Bool[Tensor, "b h n"]) -> Int[Tensor, " named"]:
        """Indices of the rows named, head by head, in the pool seen as one run of rows."""
        sequence, head, row = rows.nonzero(as_tuple=True)
        pages = self.entries[sequence, head, row // self.page_size].long()
        return pages * self.page_size + row % self.page_size

    def first_rows(self) -> list[list[int]]:
        """Index of each head's first row; heads whose pages were all taken at once have them side by side."""
        starts: list[list[int]] = (self.entries[:, :, 0].long() * self.page_size).tolist()
        return starts

    def spread(self, pool: Tensor) -> Tensor:
        """Content of every row from the pages of each head, padded to the longest head."""
        return pool[self._pages(self.longest)].flatten(2, 3)[:, :, : self.longest]

    def _pages(self, rows: int) -> Int[Tensor, "b h p"]:
        return self.entries[:, :, : math.ceil(rows / self.page_size)].clamp(min=0)

    # How it changes.

    def resize(self, lengths: Int[Tensor, "b h"], spare: int) -> None:
        """Give every head so many rows, in place, and pages for them and `spare` more."""
        self.longest = int(lengths.max()) if lengths.numel() else 0
        self._fit(lengths, spare)
        self.lengths.copy_(lengths)

    def reserve(self, rows: int, *, least: int | None = None) -> None:
        """Take pages, so that so many rows can come in; where there is room for `least`, nothing need be taken."""
        if least is None or self._room < least:
            self._fit(self.lengths, rows)

    def count(self, appended: int) -> None:
        """Take note of rows that were appended to every head, and are in `lengths` already."""
        self._room -= appended
        self.longest = min(self.longest + appended, self.entries.shape[-1] * self.page_size)

    def select(self, indices: Int[Tensor, " new"]) -> tuple[Int[Tensor, " copies"], Int[Tensor, " copies"]] | None:
        """Keep the sequences at `indices`, in that order; one taken several times gets pages of its own.

        Returns:
            pages whose content is to be copied, and where to; None where nothing changes.
        """
        chosen = indices.tolist()
        if chosen == list(range(len(self.lengths))):
            return None
        indices = indices.to(self.device)
        unused = torch.ones(len(self.lengths), dtype=torch.bool, device=self.device)
        unused[indices] = False
        self._release(self.entries[unused])
        self.entries, self.lengths = self.entries[indices], self.lengths[indices]
        self.longest = int(self.lengths.max()) if self.lengths.numel() else 0
        self._room = 0
        again = torch.zeros(len(chosen), dtype=torch.bool, device=self.device)
        again[[row for row, source in enumerate(chosen) if source in chosen[:row]]] = True
        shared = again[:, None, None] & (self.entries >= 0)
        sources = self.entries[shared].long()
        self._grow(len(sources))
        pages = torch.tensor(self._take(len(sources)), dtype=torch.long, device=self.device)
        self.entries = self.entries.masked_scatter(shared, pages.to(torch.int32))
        return sources, pages

    def to(self, device: torch.device) -> None:
        """Move it to another device."""
        self.entries, self.lengths = self.entries.to(device), self.lengths.to(device)

    # Pages.

    def _fit(self, lengths: Int[Tensor, "b h"], spare: int) -> None:
        """Give back and take pages until every head has just enough for so many rows and `spare` more."""
        needed = (lengths + (spare + self.page_size - 1)) // self.page_size
        width = int(needed.max()) if needed.numel() else 0
        if width > self.entries.shape[-1]:
            more = self.entries.new_full((*lengths.shape, width - self.entries.shape[-1]), -1)
            self.entries = torch.cat([self.entries, more], dim=-1)
        place = torch.arange(self.entries.shape[-1], device=self.device)
        owned = self.entries >= 0
        surplus = owned & (place >= needed[:, :, None])
        if surplus.any():
            self._release(self.entries[surplus])
            self.entries.masked_fill_(surplus, -1)
        wanted = ~owned & (place < needed[:, :, None])
        count = int(wanted.sum())
        if count:
            self._grow(count)
            pages = torch.tensor(self._take(count), dtype=torch.int32, device=self.device)
            self.entries.masked_scatter_(wanted, pages)
        self._room = int((needed * self.page_size - lengths).min()) if needed.numel() else 0
        self.shrink()
        # Padding that came may have counted for more than there are pages.
        self.longest = min(self.longest, self.entries.shape[-1] * self.page_size)

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
        # The first filling is exact: a prompt that is never continued pays for no slack.
        grown = self.capacity + max(missing, math.ceil(self.capacity * _SLACK))
        self._resize(torch.arange(self.capacity, device=self.device), grown)
        self._free.extend(range(grown - 1, self.capacity - 1, -1))
        self.capacity = grown

    def shrink(self) -> None:
        """Return memory when more pages lie free than the slack allows."""
        live = self.capacity - len(self._free)
        if self.frozen or len(self._free) <= 2 * math.ceil(live * _SLACK):
            return
        owned = self.entries >= 0
        self.capacity = live + math.ceil(live * _SLACK)
        self._resize(self.entries[owned].long(), self.capacity)
        renumbered = torch.arange(live, dtype=torch.int32, device=self.device)
        self.entries = torch.full_like(self.entries, -1).masked_scatter(owned, renumbered)
        width = int(owned.any(dim=0).any(dim=0).sum())
        self.entries = self.entries[:, :, :width].clone()
        self._free = list(range(self.capacity - 1, live - 1, -1))
