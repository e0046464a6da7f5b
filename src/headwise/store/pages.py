"""Pages: rows of every (sequence, KV head), exact ones or codes -> a pool of pages that hold them and nothing else.

Rows of a head may lie in any order: keys carry their rotary position and every row knows its column. So evicting
is overwriting the row, or moving the last row into the hole; a page that falls empty goes back to the pool.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch

from headwise.errors import InputError
from headwise.kernels.interface import Checked, Coding, PageView
from headwise.store.page_table import PageTable
from headwise.store.row_parts import RowPart, row_bytes
from headwise.store.rows import Rows
from headwise.types import Bool, Float, Int, Tensor


def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory; tests fill it with NaN, so that whoever reads slack is caught."""
    return torch.empty(*shape, dtype=dtype, device=device)


class _Pools:
    """The memory of the pages, one tensor for each part of a row. By itself, so that nothing refers in a circle."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def rebuild(self, pages: Int[Tensor, " live"], capacity: int) -> None:
        """Copy those pages to the front of new pools of that capacity, one pool at a time."""
        for name, pool in self.tensors.items():
            fresh = empty(capacity, *pool.shape[1:], dtype=pool.dtype, device=pool.device)
            torch.index_select(pool, 0, pages, out=fresh[: len(pages)])
            self.tensors[name] = fresh


class PagePool:
    """Ragged rows of one layer in pages of `page_size` rows.

    Args:
        heads: sequences, and KV heads.
        parts: what a row consists of.
        page_size: rows in a page.

    Attributes:
        row_bytes: of one row.
        pages: which of them are whose.
    """

    def __init__(
        self, heads: Sequence[int], parts: tuple[RowPart, ...], *, page_size: int, device: torch.device
    ) -> None:
        shapes = {part.name: ((0, page_size, *part.shape), part.dtype) for part in parts}
        self._pools = _Pools(
            {name: empty(*shape, dtype=dtype, device=device) for name, (shape, dtype) in shapes.items()}
        )
        self.row_bytes = row_bytes(parts)
        self._fresh: dict[str, float] = {}
        # Those of them that kernels do not write.
        self._unwritten: dict[str, float] = {}
        for part in parts:
            self._note(part)
        self._checked: tuple[Any, ...] = (None,)
        self.pages = PageTable(heads[0], heads[1], page_size, device, self._pools.rebuild)

    # What it holds.

    @property
    def pools(self) -> dict[str, Tensor]:
        """Memory of the pages `[pages, s, ...]`, one tensor for each part of a row, by name."""
        return self._pools.tensors

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.pages.device

    @property
    def page_size(self) -> int:
        """Rows in a page."""
        return self.pages.page_size

    @property
    def lengths(self) -> Int[Tensor, "b h"]:
        """Rows of every head."""
        return self.pages.lengths

    @property
    def longest(self) -> int:
        """No head is longer."""
        return self.pages.longest

    @property
    def used_bytes(self) -> int:
        """Bytes of the kept rows."""
        return int(self.lengths.sum()) * self.row_bytes

    def tensors(self) -> list[Tensor]:
        """Every tensor it holds on to."""
        return [*self.pools.values(), self.pages.entries, self.lengths]

    def view(self, coding: Coding | None = None) -> PageView:
        """What a kernel reads.

        Args:
            coding: how codes are read, where the rows are; always by the same pools of it.
        """
        pools, pages = self._pools.tensors, self.pages
        numbers, scores = (pools["keys"], pools["values"]), pools.get("scores")
        table, lengths, (checked, *known) = pages.entries, pages.lengths, self._checked
        if not (known and known[0]() is numbers[0] and known[1]() is table and known[2]() is lengths):
            # Not held: nothing may be kept that has been replaced.
            checked = Checked()
            self._checked = (checked, *(weakref.ref(each) for each in (numbers[0], table, lengths)))
        biases = pools.get("biases")
        view = PageView(*numbers, pools["columns"], scores, table, lengths, pages.longest, coding, biases)
        return view.known_by(checked)

    def kept(self, part: str) -> Tensor | None:
        """That part of every row, padded to the longest head; undefined where `occupied` is False."""
        return self.pages.spread(self.pools[part]) if part in self.pools else None

    def occupied(self) -> Bool[Tensor, "b h n"]:
        """True for the rows below each head's length, over as many as the longest head has."""
        return self.pages.occupied()

    def rows(self, *names: str) -> Rows:
        """A copy of everything kept, side by side, or of those parts of it that there are."""
        at = self.pages.addresses(self.longest)
        parts = {name: pool.flatten(0, 1)[at] for name, pool in self.pools.items() if not names or name in names}
        return Rows(parts, self.occupied())

    def gather(self, named: Bool[Tensor, "b h n"], *names: str) -> Rows:
        """A copy of those rows side by side, or of those parts of them; what pads the shorter heads is 0."""
        counts, at = named.sum(dim=-1, keepdim=True), self.pages.addresses_of(named)
        there = torch.arange(int(counts.max()) if counts.numel() else 0, device=self.device) < counts

        def spread(pool: Tensor) -> Tensor:
            rows = pool.flatten(0, 1)[at]
            where = there if rows.dim() == 1 else there[..., None]
            return rows.new_zeros(*there.shape, *rows.shape[1:]).masked_scatter_(where, rows)

        asked = {name: pool for name, pool in self.pools.items() if not names or name in names}
        return Rows({name: spread(pool) for name, pool in asked.items()}, there)

    # How it changes.

    def add_scores(self, increments: Float[Tensor, "b h n"]) -> None:
        """Add to the scores of the kept rows; increments of rows beyond a head's length are ignored."""
        occupied = self.occupied()
        at = self.pages.addresses(self.longest)[occupied]
        self.pools["scores"].view(-1)[at] += increments[occupied]

    def replace(self, part: str, content: Tensor) -> None:
        """Write other content `[b, h, n, ...]` of one part of the kept rows."""
        there = self.occupied()
        self.pools[part].flatten(0, 1)[self.pages.addresses(self.longest)[there]] = content[there].to(
            self.pools[part].dtype
        )

    def give(self, part: RowPart, content: Float[Tensor, "b h n"]) -> None:
        """Give all rows one part more, of which kept ones have that content."""
        assert part.name not in self.pools
        shape = next(iter(self.pools.values())).shape[:2]
        self.pools[part.name] = empty(*shape, *part.shape, dtype=part.dtype, device=self.device)
        self.row_bytes += part.nbytes
        self._note(part)
        self._checked = (None,)
        self.replace(part.name, content)

    def make_fresh(self, count: int) -> None:
        """Write what new rows have of parts that kernels do not write, for so many behind the last of every head."""
        for name, value in self._unwritten.items():
            self.pools[name].flatten(0, 1)[self.pages.behind(count)] = value

    def fill(self, rows: Rows) -> None:
        """Take in the first rows; of an empty store, the same as `commit`, with less memory in between.

        Raises:
            InputError: when they come without a part that they must have.
        """
        assert self.longest == 0
        rows = self._complete(rows)
        lengths = rows.keep.sum(dim=-1)
        self.pages.resize(lengths, 0)
        if self.longest == 0:
            return
        # The first pages of a head lie side by side, so its rows are copied in one piece, without a list of addresses.
        starts = self.pages.first_rows()
        for b, sequence in enumerate(lengths.tolist()):
            kept = rows.keep[b].nonzero()[:, 1].split(sequence)
            for h, count in enumerate(sequence):
                for name, pool in self.pools.items():
                    target = pool.flatten(0, 1)[starts[b][h] : starts[b][h] + count]
                    _copy(rows.parts[name][b, h], kept[h], target)

    def drop(self, keep: Bool[Tensor, "b h n"], spare: int = 0) -> None:
        """Keep the rows named by `keep`: the last ones of each head move into the holes that the others leave.

        Args:
            spare: rows per head that are going to be appended, for which pages are kept.
        """
        survivors = keep & self.occupied()
        lengths = survivors.sum(dim=-1)
        beyond = torch.arange(self.longest, device=self.device) >= lengths[:, :, None]
        # Listed head by head, and every head has as many of the one as of the other.
        moved = self.pages.addresses_of(survivors & beyond)
        holes = self.pages.addresses_of(~(survivors | beyond))
        if len(moved):
            for pool in self.pools.values():
                flat = pool.flatten(0, 1)
                flat[holes] = flat[moved]
        self.pages.resize(lengths, spare)

    def commit(self, keep: Bool[Tensor, "b h n"], new: Rows, spare: int = 0) -> None:
        """Keep the rows named by `keep`, drop the others, and take in the new ones that `new.keep` names.

        Nothing is shuffled that need not be: new rows, and the rows beyond a head's new length, fill the holes.

        Args:
            spare: rows per head that are going to be appended, for which pages are kept.

        Raises:
            InputError: when new rows come without a part that they must have.
        """
        held, new = self.longest, self._complete(new)
        survivors = keep & self.occupied()
        lengths = survivors.sum(dim=-1) + new.keep.sum(dim=-1)
        longest = int(lengths.max()) if lengths.numel() else 0
        moved = survivors & (torch.arange(held, device=self.device) >= lengths[:, :, None])
        stays = torch.zeros(*lengths.shape, max(longest, held), dtype=torch.bool, device=self.device)
        stays[:, :, :held] = survivors
        holes = (torch.arange(longest, device=self.device) < lengths[:, :, None]) & ~stays[:, :, :longest]

        # Sources and holes are listed head by head and every head has as many of the one as of the other.
        moving, taken = moved.any(), new.keep.nonzero(as_tuple=True)
        is_new = torch.cat([moved, new.keep], dim=-1).nonzero(as_tuple=True)[2] >= held
        from_pages = self.pages.addresses(held)[moved] if moving else None
        moved_rows = {name: pool.flatten(0, 1)[from_pages] if moving else None for name, pool in self.pools.items()}

        self.pages.resize(lengths, spare)
        targets = self.pages.addresses(longest)[holes]
        for name, pool in self.pools.items():
            flat, rest = pool.flatten(0, 1), moved_rows[name]
            flat[targets[is_new]] = new.parts[name][taken].to(flat.dtype)
            if rest is not None:
                flat[targets[~is_new]] = rest

    def select(self, indices: Int[Tensor, " new"]) -> None:
        """Keep the sequences at `indices`, in that order; pages of one taken several times are copied."""
        copies = self.pages.select(indices)
        if copies is None:
            return
        sources, targets = copies
        if len(sources):
            for pool in self.pools.values():
                pool[targets] = pool[sources]
        self.pages.shrink()

    def to(self, device: torch.device) -> None:
        """Move everything to another device."""
        self._pools.tensors = {name: pool.to(device) for name, pool in self.pools.items()}
        self.pages.to(device)

    def _note(self, part: RowPart) -> None:
        if part.fresh is not None:
            self._fresh[part.name] = part.fresh
            if not part.appended:
                self._unwritten[part.name] = part.fresh

    def _complete(self, rows: Rows) -> Rows:
        """The same rows with all the parts that rows have here."""
        missing = self.pools.keys() - rows.parts.keys()
        if lost := sorted(missing - self._fresh.keys()):
            raise InputError(f"rows must have {', '.join(self.pools)}, and these come without {', '.join(lost)}")
        shape = rows.keep.shape
        made = {n: self.pools[n].new_full((*shape, *self.pools[n].shape[2:]), self._fresh[n]) for n in missing}
        return rows.replacing(**made) if made else rows


def _copy(content: Tensor, kept: Int[Tensor, " count"], target: Tensor) -> None:
    """Those rows of one head to their place, without a copy in between where there need be none."""
    if len(target) == len(content):
        target.copy_(content)
    elif target.dtype == content.dtype:
        torch.index_select(content, 0, kept, out=target)
    else:
        target.copy_(content[kept])
