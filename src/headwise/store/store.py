"""4/7 store: kept rows of every (sequence, KV head) -> pages of exact rows, and pages of codes for the older ones.

Every stage sees one run of rows per head: the exact ones, then those of each format, each part padded to its longest
head. A row is written down as codes once, when enough newer ones have come, and stays so.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from headwise.kernels import Kernels
from headwise.quant.formats import Precision
from headwise.store.coded import PackedPages
from headwise.store.pages import PagedStore
from headwise.store.rows import COLUMN_BYTES, Rows
from headwise.types import Bool, Float, Int, PageView, Tensor

# Of the first pages of codes' names in a saved cache.
_PACKED = "packed"


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
        like = like.cut(slice(0, 0))
        if dtype is not None:
            like = replace(like, keys=like.keys.to(dtype), values=like.values.to(dtype))
        self.exact = PagedStore.like(like, page_size=page_size, scored=scored)
        offered = () if precision is None else precision.formats
        self.packed = [PackedPages(like, format, page_size=page_size, scored=scored) for format in offered]
        self.formats = self.exact.lengths.new_zeros(self.exact.lengths.shape) if formats is None else formats
        # Rows that have come since old ones were last written down as codes.
        self._unpacked = 0

    # What it holds.

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.exact.device

    @property
    def value_dim(self) -> int:
        """Head dimension of values."""
        return self.exact.values.shape[-1]

    @property
    def lengths(self) -> Int[Tensor, "b h"]:
        """Rows of every head."""
        return self.exact.lengths + sum(part.pages.lengths for part in self.packed)

    @property
    def longest(self) -> int:
        """Over how many rows a head's are spread, where those of all heads lie side by side."""
        return sum(self._widths)

    @property
    def used_bytes(self) -> int:
        """Bytes of the kept rows."""
        return sum(pages.used_bytes for pages in self._parts)

    def tensors(self) -> list[Tensor]:
        """Every tensor it holds on to."""
        return [tensor for pages in self._parts for tensor in pages.tensors()] + [self.formats]

    def view(self) -> list[PageView]:
        """What a decode kernel reads: the exact rows, then those of each format."""
        return [self.exact.view(), *(part.view() for part in self.packed)]

    def stored(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """New rows in the type that exact ones are stored in."""
        return keys.to(self.exact.keys.dtype), values.to(self.exact.values.dtype)

    def kept_columns(self) -> Int[Tensor, "b h n"]:
        """Column of every row; undefined where `occupied` is False."""
        return _along([pages.kept_columns() for pages in self._parts])

    def kept_scores(self) -> Float[Tensor, "b h n"] | None:
        """Score of every row; undefined where `occupied` is False."""
        scores = [scores for pages in self._parts if (scores := pages.kept_scores()) is not None]
        return _along(scores) if scores else None

    def occupied(self) -> Bool[Tensor, "b h n"]:
        """True where there is a row."""
        return _along([pages.occupied() for pages in self._parts])

    def rows(self) -> Rows:
        """A copy of everything kept, side by side, as numbers."""
        return _side_by_side([self.exact.rows(), *(part.decode(part.pages.rows()) for part in self.packed)])

    def gather(self, named: Bool[Tensor, "b h n"]) -> Rows:
        """A copy of those rows side by side, as numbers; what pads the shorter heads is 0."""
        exact, *packed = self._cut(named)
        gathered = [part.decode(part.pages.gather(own)) for part, own in zip(self.packed, packed, strict=True)]
        return _side_by_side([self.exact.gather(exact), *gathered])

    def format_names(self) -> NDArray[Any] | None:
        """Format of each head's older rows, `[batch, heads]`; None where all rows are exact."""
        if not self.packed:
            return None
        names: NDArray[Any] = np.array([*(str(part.format) for part in self.packed), "exact"])
        chosen: NDArray[Any] = names[self.formats.cpu().numpy()]
        return chosen

    # How it changes.

    def add_scores(self, increments: Float[Tensor, "b h n"]) -> None:
        """Add to the scores of the kept rows; increments where there is no row are ignored."""
        for pages, own in zip(self._parts, self._cut(increments), strict=True):
            pages.add_scores(own)

    def fill(self, rows: Rows) -> None:
        """Take in the first rows, in the order of their columns."""
        if not self.packed:
            self.exact.fill(rows)
            return
        rank, lengths = rows.keep.cumsum(dim=-1) - 1, rows.keep.sum(dim=-1, keepdim=True)
        old = self._old(rank, lengths) & rows.keep
        self.exact.fill(replace(rows, keep=rows.keep & ~old))
        for part, keep in zip(self.packed, self._by_format(old), strict=True):
            if bool(keep.any()):
                part.pages.fill(replace(part.encode(rows), keep=keep))

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

        Args:
            real: rows to take in; None means all of them.
            scores: of the new rows, where rows carry one.
            increments: to add to the scores of the rows already there.
        """
        if increments is not None:
            increments = add_on_codes(self.view(), increments, kernels)
        self.exact.append(keys, values, columns, real, scores, increments, kernels)
        self._unpacked += keys.shape[2]
        self.pack()

    def count(self, appended: int) -> None:
        """Take note of rows that were appended to the exact ones of every head."""
        self.exact.count(appended)
        self._unpacked += appended

    def reserve(self, rows: int) -> None:
        """Take pages, so that `append` can take in so many rows without any other."""
        self.exact.reserve(rows)

    def volatile(self) -> list[Tensor]:
        """What a captured step changes of it, beside rows behind a head's last."""
        scores = [pages.scores for pages in self._parts if pages.scores is not None]
        return [self.exact.lengths, *scores]

    def freeze(self, frozen: bool) -> None:
        """While frozen no memory is given back and no row becomes codes: captured steps find all in its place."""
        for pages in self._parts:
            pages.frozen = frozen

    def drop(self, keep: Bool[Tensor, "b h n"], spare: int = 0) -> None:
        """Keep the rows named by `keep`.

        Args:
            spare: rows per head that are going to be appended, for which pages are kept.
        """
        exact, *packed = self._cut(keep)
        self.exact.drop(exact, spare)
        self._drop_packed(packed)

    def commit(self, keep: Bool[Tensor, "b h n"], new: Rows, spare: int = 0) -> None:
        """Keep the rows named by `keep`, drop the others, and take in the new ones that `new.keep` names.

        Args:
            spare: rows per head that are going to be appended, for which pages are kept.
        """
        exact, *packed = self._cut(keep)
        self.exact.commit(exact, new, spare)
        self._drop_packed(packed)
        self._unpacked += new.keep.shape[-1]
        self.pack()

    def pack(self) -> None:
        """Write old rows down as codes, once a page's worth of new ones has come.

        What has come is counted, not how much there is: a head that stays exact as a whole is always long.
        """
        if self.precision is None or self.exact.frozen or self._unpacked < self.page_size:
            return
        self._unpacked = 0
        occupied = self.exact.occupied()
        columns = self.exact.kept_columns().masked_fill(~occupied, torch.iinfo(torch.int32).max)
        rank = columns.argsort(dim=-1).argsort(dim=-1)
        old = self._old(rank, self.exact.lengths[:, :, None]) & occupied
        if not bool(old.any()):
            return
        rows = self.exact.gather(old)
        for part, keep in zip(self.packed, self._by_format(rows.keep, self.precision.later), strict=True):
            if bool(keep.any()):
                everything = part.pages.occupied()
                part.pages.commit(everything, replace(part.encode(rows), keep=keep))
        self.exact.drop(~old)

    def select(self, indices: Int[Tensor, " new"]) -> None:
        """Keep the sequences at `indices`, in that order; pages of one taken several times are copied."""
        for pages in self._parts:
            pages.select(indices)
        self.formats = self.formats[indices.to(self.device)]

    def to(self, device: torch.device) -> None:
        """Move everything to another device."""
        for pages in self._parts:
            pages.to(device)
        self.formats = self.formats.to(device)

    # Written down, and read again.

    def state(self) -> dict[str, Tensor]:
        """What `restore` needs, without page slack; codes stay codes."""
        state = _state("", self.exact)
        for index, part in enumerate(self.packed):
            state |= _state(f"{_PACKED}{index}_", part.pages)
        return state | ({"formats": self.formats, "unpacked": torch.tensor(self._unpacked)} if self.packed else {})

    @classmethod
    def restore(cls, state: dict[str, Tensor], *, page_size: int, precision: Precision | None) -> RowStore:
        """A store as `state` described it."""
        exact = _restored("", state)
        scored = exact.scores is not None
        formats = state.get("formats")
        store = cls(exact, page_size=page_size, scored=scored, precision=precision, formats=formats)
        store.exact.fill(exact)
        for index, part in enumerate(store.packed):
            part.pages.fill(_restored(f"{_PACKED}{index}_", state))
        store._unpacked = int(state.get("unpacked", 0))
        return store

    # Its parts.

    @property
    def _parts(self) -> list[PagedStore]:
        return [self.exact, *(part.pages for part in self.packed)]

    @property
    def _widths(self) -> list[int]:
        return [pages.longest for pages in self._parts]

    def _cut(self, along: Tensor) -> list[Any]:
        """A tensor over the rows of all parts, part by part."""
        return list(along.split(self._widths, dim=-1)) if self.packed else [along]

    def _drop_packed(self, keep: list[Tensor]) -> None:
        for part, own in zip(self.packed, keep, strict=True):
            part.pages.drop(own)

    def _old(self, rank: Int[Tensor, "b h n"], lengths: Int[Tensor, "b h 1"]) -> Bool[Tensor, "b h n"]:
        """Rows that are codes or should be, by their order among the rows of their head."""
        if self.precision is None:
            return torch.zeros_like(rank, dtype=torch.bool)
        inside = (rank >= self.precision.sinks) & (rank < lengths - self.precision.recent)
        return inside & (self.formats >= 0)[:, :, None]

    def _by_format(self, old: Bool[Tensor, "b h n"], format: int | None = None) -> list[Bool[Tensor, "b h n"]]:
        """Which of the rows go where: all into one format, or each into that of its head."""
        if format is not None:
            return [old if index == format else torch.zeros_like(old) for index in range(len(self.packed))]
        return [old & (self.formats == index)[:, :, None] for index in range(len(self.packed))]


def exact_row_bytes(keys: Tensor, values: Tensor, dtype: torch.dtype | None) -> int:
    """Bytes of one exact row without a score: its key, its value and its column."""
    return (keys.shape[-1] + values.shape[-1]) * (dtype or keys.dtype).itemsize + COLUMN_BYTES


def add_on_codes(views: list[PageView], increments: Float[Tensor, "b h n"], kernels: Kernels) -> Float[Tensor, "b h m"]:
    """Add to the scores of rows that are codes, without waiting for the device.

    Args:
        increments: over the rows of all views.

    Returns:
        those of the exact rows.
    """
    mine: Tensor
    mine, *others = increments.split([view.longest for view in views], dim=-1)
    for view, own in zip(views[1:], others, strict=True):
        heads = own.shape[:2]
        keys, values = (pool.new_empty(*heads, 0, pool.shape[-1]) for pool in (view.keys, view.values))
        kernels.append(view, keys, values, view.columns.new_empty(0), None, own.new_empty(*heads, 0), own)
    return mine


def _along(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _side_by_side(parts: list[Rows]) -> Rows:
    if len(parts) == 1:
        return parts[0]
    contents = [torch.cat(same, dim=2) for same in zip(*(part.contents() for part in parts), strict=True)]
    keys, values, columns, *rest = contents
    return Rows(keys, values, columns, rest[0] if rest else None, torch.cat([part.keep for part in parts], dim=-1))


_NAMES = ("keys", "values", "columns", "scores", "key_steps", "value_steps")


def _state(prefix: str, pages: PagedStore) -> dict[str, Tensor]:
    rows = pages.rows()
    named = {name: getattr(rows, name) for name in _NAMES}
    return {f"{prefix}lengths": pages.lengths} | {
        prefix + name: part[rows.keep] for name, part in named.items() if part is not None
    }


def _restored(prefix: str, state: dict[str, Tensor]) -> Rows:
    lengths = state[f"{prefix}lengths"]
    keep = torch.arange(int(lengths.max()) if lengths.numel() else 0, device=lengths.device) < lengths[:, :, None]

    def spread(name: str) -> Any:
        rows = state.get(prefix + name)
        return None if rows is None else rows.new_zeros(*keep.shape, *rows.shape[1:]).index_put_((keep,), rows)

    keys, values, columns, scores, key_steps, value_steps = map(spread, _NAMES)
    return Rows(keys, values, columns, scores, keep, key_steps, value_steps)
