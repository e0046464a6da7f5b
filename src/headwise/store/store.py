"""4/7 store: kept rows of every (sequence, KV head) -> pages of exact rows, and pages of codes for the older ones.

Every stage sees one run of rows per head: the exact ones, then those of each format, each part padded to its longest
head. A row is written down as codes once, when enough newer ones have come, and stays so.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from headwise.kernels.interface import AppendRequest, Kernels, PageView
from headwise.quant.formats import Precision
from headwise.store.coded import CodedPages, by_format, old_rows
from headwise.store.pages import PagePool
from headwise.store.row_parts import row_parts
from headwise.store.rows import Rows, side_by_side
from headwise.store.saved import load_rows, save_rows
from headwise.types import Bool, Float, Int, Tensor

# What the names of coded pages begin with in a saved cache.
_CODED = "packed"


class RowStore:
    """Ragged rows of one layer.

    Args:
        like: rows of the kind that will come.
        page_size: rows in a page.
        scored: whether rows carry an accumulated score.
        dtype: of exact rows; None for that of the rows that come.
        precision: how older rows are stored; None keeps all of them exact.
        formats: which of the precision's formats each head gets, -1 for staying exact; None for the first.
    """

    def __init__(
        self,
        like: Rows,
        *,
        page_size: int,
        scored: bool,
        dtype: torch.dtype | None = None,
        precision: Precision | None = None,
        formats: Int[Tensor, "b h"] | None = None,
    ) -> None:
        self.page_size = page_size
        self.precision = precision
        heads, device, dtype = like.keys.shape[:2], like.keys.device, dtype or like.keys.dtype
        dims = like.keys.shape[-1], like.values.shape[-1]
        self.exact = PagePool(heads, row_parts(*dims, dtype, scored=scored), page_size=page_size, device=device)
        self.coded = [
            CodedPages(heads, *dims, dtype, format, page_size=page_size, scored=scored, device=device)
            for format in (() if precision is None else precision.formats)
        ]
        self.formats = self.exact.lengths.new_zeros(self.exact.lengths.shape) if formats is None else formats
        # Rows that have come since old ones were last written down as codes.
        self._not_encoded = 0

    # What it holds.

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.exact.device

    @property
    def frozen(self) -> bool:
        """Whether a step over it is captured."""
        return self.exact.pages.frozen

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
        return sum(pool.longest for pool in self._pools)

    @property
    def used_bytes(self) -> int:
        """Bytes of the kept rows."""
        return sum(pool.used_bytes for pool in self._pools)

    def tensors(self) -> list[Tensor]:
        """Every tensor it holds on to."""
        return [tensor for pool in self._pools for tensor in pool.tensors()] + [self.formats]

    def view(self) -> list[PageView]:
        """What a kernel reads: the exact rows, then those of each format.

        While frozen, heads are taken to be as long as their pages have room: how long they are, only the device knows.
        """
        views = [self.exact.view(), *(part.view() for part in self.coded)]
        return [replace(view, longest=view.capacity) for view in views] if self.frozen else views

    def stored(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """New rows in the type that exact ones are stored in."""
        pools = self.exact.pools
        return keys.to(pools["keys"].dtype), values.to(pools["values"].dtype)

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

    def rows(self) -> Rows:
        """A copy of everything kept, side by side, as numbers."""
        return side_by_side([self.exact.rows(), *(part.decode(part.pool.rows()) for part in self.coded)])

    def gather(self, named: Bool[Tensor, "b h n"]) -> Rows:
        """A copy of those rows side by side, as numbers; what pads the shorter heads is 0."""
        exact, *coded = self._cut(named)
        gathered = [part.decode(part.pool.gather(own)) for part, own in zip(self.coded, coded, strict=True)]
        return side_by_side([self.exact.gather(exact), *gathered])

    # How it changes.

    def add_scores(self, increments: Float[Tensor, "b h n"]) -> None:
        """Add to the scores of the kept rows; increments where there is no row are ignored."""
        for pool, own in zip(self._pools, self._cut(increments), strict=True):
            pool.add_scores(own)

    def fill(self, rows: Rows) -> None:
        """Take in the first rows, in the order of their columns."""
        if self.precision is None:
            self.exact.fill(rows)
            return
        rank, lengths = rows.keep.cumsum(dim=-1) - 1, rows.keep.sum(dim=-1, keepdim=True)
        old = old_rows(self.precision, self.formats, rank, lengths) & rows.keep
        self.exact.fill(rows.naming(rows.keep & ~old))
        for part, keep in zip(self.coded, by_format(old, self.formats, len(self.coded)), strict=True):
            if bool(keep.any()):
                part.pool.fill(part.encode(rows).naming(keep))

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
        """Take in new rows, in every head the same, and drop nothing; see `AppendRequest`.

        Waits for the device only where pages run out, which is once in `page_size` rows. While frozen the rows are
        written and not counted: a captured step is replayed more often than this is called.
        """
        count = keys.shape[2]
        if not self.frozen:
            self.exact.pages.reserve(count + self.page_size - 1, least=count)
        self.exact.make_fresh(count)
        kernels.append(AppendRequest(self.view(), keys, values, columns, real, scores, increments))
        if not self.frozen:
            self.count(count)
            self.encode_old()

    def count(self, appended: int) -> None:
        """Take note of rows that were appended to the exact ones of every head."""
        self.exact.pages.count(appended)
        self._not_encoded += appended

    def reserve(self, rows: int) -> None:
        """Take pages, so that `append` can take in so many rows without any other."""
        self.exact.pages.reserve(rows)

    def volatile(self) -> list[Tensor]:
        """What a captured step changes of it, beside rows behind a head's last."""
        return [self.exact.lengths, *(pool.pools["scores"] for pool in self._pools if "scores" in pool.pools)]

    def freeze(self, frozen: bool) -> None:
        """While frozen no memory is given back and no row becomes codes: captured steps find all in its place."""
        for pool in self._pools:
            pool.pages.frozen = frozen

    def drop(self, keep: Bool[Tensor, "b h n"], spare: int = 0) -> None:
        """Keep the rows named by `keep`.

        Args:
            spare: rows per head that are going to be appended, for which pages are kept.
        """
        exact, *coded = self._cut(keep)
        self.exact.drop(exact, spare)
        self._drop_coded(coded)

    def commit(self, keep: Bool[Tensor, "b h n"], new: Rows, spare: int = 0) -> None:
        """Keep the rows named by `keep`, drop the others, and take in the new ones that `new.keep` names.

        Args:
            spare: rows per head that are going to be appended, for which pages are kept.
        """
        exact, *coded = self._cut(keep)
        self.exact.commit(exact, new, spare)
        self._drop_coded(coded)
        self._not_encoded += new.keep.shape[-1]
        self.encode_old()

    def encode_old(self) -> None:
        """Write old rows down as codes, once a page's worth of new ones has come.

        What has come is counted, not how much there is: a head that stays exact as a whole is always long.
        """
        if self.precision is None or self.frozen or self._not_encoded < self.page_size:
            return
        self._not_encoded = 0
        occupied, columns = self.exact.occupied(), self.exact.kept("columns")
        assert columns is not None
        columns = columns.masked_fill(~occupied, torch.iinfo(torch.int32).max)
        rank = columns.argsort(dim=-1).argsort(dim=-1)
        old = old_rows(self.precision, self.formats, rank, self.exact.lengths[:, :, None]) & occupied
        if not bool(old.any()):
            return
        rows = self.exact.gather(old)
        named = by_format(rows.keep, self.formats, len(self.coded), self.precision.later)
        for part, keep in zip(self.coded, named, strict=True):
            if bool(keep.any()):
                part.pool.commit(part.pool.occupied(), part.encode(rows).naming(keep))
        self.exact.drop(~old)

    def select(self, indices: Int[Tensor, " new"]) -> None:
        """Keep the sequences at `indices`, in that order; pages of one taken several times are copied."""
        for pool in self._pools:
            pool.select(indices)
        self.formats = self.formats[indices.to(self.device)]

    def to(self, device: torch.device) -> None:
        """Move everything to another device."""
        for pool in self._pools:
            pool.to(device)
        self.formats = self.formats.to(device)

    # Written down, and read again.

    def state(self) -> dict[str, Tensor]:
        """What `restore` needs, without page slack; codes stay codes."""
        state = save_rows("", self.exact)
        for index, part in enumerate(self.coded):
            state |= save_rows(f"{_CODED}{index}_", part.pool)
        return state | (
            {"formats": self.formats, "unpacked": torch.tensor(self._not_encoded, device="cpu")} if self.coded else {}
        )

    @classmethod
    def restore(cls, state: dict[str, Tensor], *, page_size: int, precision: Precision | None) -> RowStore:
        """A store as `state` described it.

        Raises:
            InputError: when a part of the rows is missing.
        """
        exact = load_rows("", state)
        scored, formats = exact.scores is not None, state.get("formats")
        store = cls(exact, page_size=page_size, scored=scored, precision=precision, formats=formats)
        store.exact.fill(exact)
        for index, part in enumerate(store.coded):
            part.pool.fill(load_rows(f"{_CODED}{index}_", state))
        store._not_encoded = int(state.get("unpacked", 0))
        return store

    # Its parts.

    @property
    def _pools(self) -> list[PagePool]:
        return [self.exact, *(part.pool for part in self.coded)]

    def _kept(self, part: str) -> Tensor | None:
        held = [rows for pool in self._pools if (rows := pool.kept(part)) is not None]
        return _along(held) if held else None

    def _cut(self, along: Tensor) -> list[Any]:
        """A tensor over the rows of all parts, part by part."""
        return list(along.split([pool.longest for pool in self._pools], dim=-1)) if self.coded else [along]

    def _drop_coded(self, keep: list[Tensor]) -> None:
        for part, own in zip(self.coded, keep, strict=True):
            part.pool.drop(own)


def _along(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
