"""Row attention: newest queries of a layer, and the pages of what it holds -> what each query gives every row.

By the kernels that decode, which read codes as they are: no row is copied or turned into numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from headwise.kernels.interface import Checked, DecodeRequest, Kernels, Marks, PageView
from headwise.store.store import RowStore
from headwise.types import Bool, Float, Int, LogitOptions, Tensor


@dataclass(frozen=True)
class RowAttention:
    """Attention over the rows of a store, as it was when they were chosen from.

    Attributes:
        query, columns: queries of the newest tokens, and the columns of these, which ascend.
        options: how the model makes logits.
        seen: columns that have come; the store has rows of none that is padding.
        gates, marks: what their product adds to the logits of every column, where that is looked at: of the query
            heads, and of the first columns.
    """

    query: Float[Tensor, "b h g q d"]
    columns: Int[Tensor, " q"]
    options: LogitOptions
    store: RowStore
    kernels: Kernels
    seen: int
    gates: Float[Tensor, "h g"] | None = None
    marks: Float[Tensor, "b m"] | None = None

    def of(self, at: Int[Tensor, "b r"], there: Bool[Tensor, "b r"]) -> Float[Tensor, "b h g r n"]:
        """Attention of some of the queries to every row, 0 where there is none.

        Args:
            at: index of each query.
            there: whether there is such a query; what it gives is 0 otherwise.
        """
        batch, heads, group, _, dim = self.query.shape
        query = self.query.gather(3, at[:, None, None, :, None].expand(-1, heads, group, -1, dim))
        own = self.columns[at]
        first, views = self._from(own.masked_fill(~there, self.seen))
        mask = (own[..., None] >= torch.arange(first, self.seen + 1, device=at.device)) & there[..., None]
        exact = self.store.exact.pools
        keys, values = (exact[name].new_empty(batch, heads, 0, exact[name].shape[-1]) for name in ("keys", "values"))
        request = DecodeRequest(query, views, keys, values, mask, self.options, with_mass=True)
        # The mass is summed over a group, so each of its heads makes one by itself.
        return torch.stack([self._of_head(request, g) for g in range(group)], dim=2)

    def _from(self, columns: Int[Tensor, "b r"]) -> tuple[int, list[PageView]]:
        """The first column that matters to queries of those columns, and the pages, whose columns count from there.

        Every query sees all that was there before the first of them, which is one column, so that a mask does not grow
        with what was seen. Marks are looked up by the true columns.
        """
        views, first = self.store.held_view(), min(self.seen, int(columns.min()))
        if self.marks is not None:
            return 0, views
        counted: list[PageView] = []
        for view in views:
            assert view.columns is not None
            # Looked at once, though every head of a group asks.
            own = replace(view, columns=(view.columns - first).clamp(min=0))
            counted.append(own.known_by(Checked()))
        return first, counted

    def _of_head(self, request: DecodeRequest, g: int) -> Float[Tensor, "b h r n"]:
        own, options, marks = slice(g, g + 1), request.options, None
        query = request.query[:, :, own]
        if options.sinks is not None:
            options = replace(options, sinks=options.sinks[:, own])
        if self.gates is not None and self.marks is not None:
            marks = Marks(self.gates[None, :, own, None].expand(query.shape[:4]), self.marks)
        found = self.kernels.ragged_decode(replace(request, query=query, options=options, marks=marks)).on_kept
        assert found is not None
        return found
