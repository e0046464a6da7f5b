"""4/7 store: kept rows of every (sequence, KV head) -> pages of exact rows, and pages of codes for the older ones.

A row becomes codes when enough newer ones have come, or when a choice says so; later choices may give it fewer bits,
never more.
"""

from __future__ import annotations

import torch

from headwise.kernels.interface import AppendRequest, Kernels
from headwise.quant.formats import Precision
from headwise.store.coded import CodedPages, by_format, encode_old, old_rows, recode
from headwise.store.held import HeldRows
from headwise.store.narrow import narrow
from headwise.store.pages import PagePool
from headwise.store.row_parts import BIAS, row_parts
from headwise.store.rows import Rows
from headwise.types import Bool, Float, Int, Tensor


class RowStore(HeldRows):
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
        decided: columns from the first on whose rows were given their format one by one, and keep it.
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
        self.not_encoded = self.decided = 0

    def stored(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """New rows in the type that exact ones are stored in."""
        dtype, waits = self.exact.pools["keys"].dtype, not self.frozen
        if keys.dtype is dtype and values.dtype is dtype:
            return keys, values
        return narrow(keys, dtype, "keys", waits=waits), narrow(values, dtype, "values", waits=waits)

    # How it changes.

    def add_scores(self, increments: Float[Tensor, "b h n"]) -> None:
        """Add to the scores of the kept rows; increments where there is no row are ignored."""
        for pool, own in zip(self._pools, self._cut(increments), strict=True):
            pool.add_scores(own)

    def fill(self, rows: Rows, formats: Int[Tensor, "b h n"] | None = None) -> None:
        """Take in the first rows, in the order of their columns.

        Args:
            formats: of each, -1 for an exact one; None for what the precision says of rows of that age.
        """
        keys, values = self.stored(rows.keys, rows.values)
        exact = rows.replacing(keys=keys, values=values)
        if self.precision is None:
            self.exact.fill(exact)
            return
        rank, lengths = rows.keep.cumsum(dim=-1) - 1, rows.keep.sum(dim=-1, keepdim=True)
        if formats is None:
            formats = self.formats[:, :, None]
            old = old_rows(self.precision, self.formats, rank, lengths) & rows.keep
        else:
            old = (formats >= 0) & rows.keep
            self._decide(rows.keep.shape[-1])
        self.exact.fill(exact.naming(rows.keep & ~old))
        for part, keep in zip(self.coded, by_format(old, formats, len(self.coded)), strict=True):
            if bool(keep.any()):
                part.pool.fill(part.encode(rows.naming(keep)))

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
        count, longest = keys.shape[2], self.exact.longest
        if not self.frozen:
            self.exact.pages.reserve(count + self.page_size - 1, least=count)
            if increments is not None and self.exact.longest < longest:
                # Padding had been counted, and what has pages now is shorter: there are no rows behind it.
                increments = torch.cat([increments[..., : self.exact.longest], increments[..., longest:]], dim=-1)
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

    def recode(self, keep: Bool[Tensor, "b h n"], formats: Int[Tensor, "b h n"], columns: int, spare: int) -> None:
        """Keep the rows named by `keep`, each in the format given: the one that it has, or one of fewer bits.

        While frozen all stay in the one that they have.

        Args:
            formats: by index, -1 for an exact row.
            columns: that have come in so far.
            spare: as for `commit`.
        """
        if self.frozen:
            self.drop(keep, spare)
            return
        recode(self._cut(keep), self._cut(formats), self.exact, self.coded, spare)
        self._decide(columns)

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
        encode_old(self.precision, self.formats, self.exact, self.coded, self.decided)

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

    def _decide(self, columns: int) -> None:
        """Take note that all of so many columns but the recent ones have the format that they are to have."""
        assert self.precision is not None
        self.decided = max(0, columns - self.precision.recent)

    def _drop_coded(self, keep: list[Tensor]) -> None:
        for part, own in zip(self.coded, keep, strict=True):
            part.pool.drop(own)
