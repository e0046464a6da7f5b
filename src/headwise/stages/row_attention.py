"""Row attention: newest queries of a layer, and the pages of what it holds -> what each query gives every row.

By the kernels that decode, which read codes as they are: no row is copied or turned into numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from headwise.kernels.interface import DecodeRequest, Kernels, Marks
from headwise.store.store import RowStore
from headwise.types import Bool, Float, Int, LogitOptions, Tensor


@dataclass(frozen=True)
class RowAttention:
    """Attention over the rows of a store, as it was when they were chosen from.

    Attributes:
        query, columns: queries of the newest tokens, and the columns of these.
        options: how the model makes logits.
        real: which of the columns that have come are no padding; None where all are.
        seen: columns that have come.
        gates, marks: what their product adds to the logits of every column, where that is looked at: of the query
            heads, and of the first columns.
    """

    query: Float[Tensor, "b h g q d"]
    columns: Int[Tensor, " q"]
    options: LogitOptions
    store: RowStore
    kernels: Kernels
    real: Bool[Tensor, "b seen"] | None
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
        mask = self.columns[at][..., None] >= torch.arange(self.seen, device=at.device)
        mask = mask & there[..., None]
        if self.real is not None:
            mask = mask & self.real[:, None]
        exact = self.store.exact.pools
        keys, values = (exact[name].new_empty(batch, heads, 0, exact[name].shape[-1]) for name in ("keys", "values"))
        request = DecodeRequest(query, self.store.held_view(), keys, values, mask, self.options, with_mass=True)
        # The mass is summed over a group, so each of its heads makes one by itself.
        return torch.stack([self._of_head(request, g) for g in range(group)], dim=2)

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
