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
from headwise.store.coded import CodedPages, by_format, encode_old, old_rows
from headwise.store.narrow import narrow
from headwise.store.pages import PagePool
from headwise.store.row_parts import BIAS, row_parts
from headwise.store.rows import Rows, side_by_side
from headwise.types import Bool, Float, Int, Tensor


class RowStore:
    """Ragged rows of one layer.

    Args:
        like: rows of the kind that will come.
        page_size: rows in a page.
        scored, biased: whether rows carry an accumulated score, and a bias, which `bias` gives them later otherwise.
        dtype: of exact rows; None for that of the rows that come.
        precision: how older rows are stored; None keeps all of them exact.
        formats: which of the precision's formats each head gets, -1 for staying exact; None for the first.

    Attributes:
        exact: rows as numbers.
        coded: older ones, by format.
        not_encoded: rows that have come since old ones were last written down as codes.
    """

    def __init__(
        self,
        like: Rows,
        *,
        page_size: int,
        scored: bool,
        biased: bool = False,
        dtype: torch.dtype | None = None,
        precision: Precision | None = None,
        formats: Int[Tensor, "b h"] | None = None,
    ) -> None:
        self.page_size = page_size
        self.precision = precision
        heads, device, dtype = like.keys.shape[:2], like.keys.device, dtype or like.keys.dtype
        dims = like.keys.shape[-1], like.values.shape[-1]
        parts = row_parts(*dims, dtype, scored=scored, biased=biased)
        self.exact = PagePool(heads, parts, page_size=page_size, device=device)
        self.coded = [
            CodedPages(heads, *dims, dtype, f, page_size=page_size, scored=scored, biased=biased, device=device)
            for f in (() if precision is None else precision.formats)
        ]
        self.formats = self.exact.lengths.new_zeros(self.exact.lengths.shape) if formats is None else formats
        self.not_encoded = 0

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

    def bytes_by_row(self) -> Int[Tensor, " n"]:
        """What each row of a head takes."""
        return _along([pool.lengths.new_full((pool.longest,), pool.row_bytes) for pool in self._pools])

    def tensors(self) -> list[Tensor]:
        """Every tensor it holds on to."""
        return [tensor for pool in self._pools for tensor in pool.tensors()] + [self.formats]

    def view(self) -> list[PageView]:
        """What a kernel reads: the exact rows, then those of each format that has any.

        While frozen, heads are taken to be as long as their pages have room: how long they are, only the device knows.
        """
        views = [self.exact.view(), *[part.view() for part in self.coded if part.pool.longest]]
        return [replace(view, longest=view.capacity) for view in views] if self.frozen else views

    def stored(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """New rows in the type that exact ones are stored in."""
        dtype, waits = self.exact.pools["keys"].dtype, not self.frozen
        if keys.dtype is dtype and values.dtype is dtype:
            return keys, values
        return narrow(keys, dtype, "keys", waits=waits), narrow(values, dtype, "values", waits=waits)

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
        keys, values = self.stored(rows.keys, rows.values)
        exact = rows.replacing(keys=keys, values=values)
        if self.precision is None:
            self.exact.fill(exact)
            return
        rank, lengths = rows.keep.cumsum(dim=-1) - 1, rows.keep.sum(dim=-1, keepdim=True)
        old = old_rows(self.precision, self.formats, rank, lengths) & rows.keep
        self.exact.fill(exact.naming(rows.keep & ~old))
        for part, keep in zip(self.coded, by_format(old, self.formats, len(self.coded)), strict=True):
            if bool(keep.any()):
                part.pool.fill(part.encode(rows).naming(keep))

    def replace_values(self, values: Float[Tensor, "b h n e"]) -> None:
        """Give the kept rows other values, as numbers, which become codes where the others were."""
        exact, *coded = self._cut(values, dim=2)
        self.exact.replace("values", narrow(exact, self.exact.pools["values"].dtype, "values", waits=True))
        for part, own in zip(self.coded, coded, strict=True):
            part.replace_values(own)

    def replace_scores(self, scores: Float[Tensor, "b h n"]) -> None:
        """Give the kept rows other scores."""
        for pool, own in zip(self._pools, self._cut(scores), strict=True):
            pool.replace("scores", own)

    def bias(self, biases: Float[Tensor, "b h n"]) -> None:
        """Add so much to the logits of the kept rows from now on, and nothing to those of rows that come."""
        for pool, own in zip(self._pools, self._cut(biases), strict=True):
            pool.give(BIAS, own)

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
        if scores is None and "scores" in self.exact.pools:
            scores = keys.new_zeros(keys.shape[:3], dtype=torch.float32)
        kernels.append(AppendRequest(self.view(), keys, values, columns, real, scores, increments))
        if not self.frozen:
            self.count(count)
            self.encode_old()

    def count(self, appended: int) -> None:
        """Take note of rows that were appended to the exact ones of every head."""
        self.exact.pages.count(appended)
        self.not_encoded += appended

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

    def can_forget(self, columns: int) -> bool:
        """Whether `forget` leaves what there would be without them: until they have pushed older rows into codes."""
        return self.precision is None or columns <= self.not_encoded

    def forget(self, columns: int, keep: Bool[Tensor, "b h n"]) -> None:
        """Keep the rows named by `keep`: all but those of so many newest columns."""
        self.not_encoded -= columns
        self.drop(keep)

    def drop(self, keep: Bool[Tensor, "b h n"], spare: int = 0) -> None:
        """Keep the rows named by `keep`; `spare` as for `commit`."""
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
        self.not_encoded += new.keep.shape[-1]
        self.encode_old()

    def encode_old(self) -> None:
        """Write old rows down as codes, once a page's worth of new ones has come.

        What has come is counted, not how much there is: a head that stays exact as a whole is always long.
        """
        if self.precision is None or self.frozen or self.not_encoded < self.page_size:
            return
        self.not_encoded = 0
        encode_old(self.precision, self.formats, self.exact, self.coded)

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

    def _drop_coded(self, keep: list[Tensor]) -> None:
        for part, own in zip(self.coded, keep, strict=True):
            part.pool.drop(own)


def _along(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
