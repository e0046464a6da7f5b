"""Prompt queries: queries of the prompt, pass by pass -> the newest of them, and what they may see."""

from __future__ import annotations

import torch
from torch.nn import functional

from headwise.kernels.attention import causal
from headwise.kernels.interface import AttentionMap
from headwise.types import Bool, Float, LogitOptions, Tensor


class PromptQueries:
    """What the newest tokens of a prompt that is coming in asked.

    Attributes:
        query: as many as were wanted, or more.
        mask: True where such a query sees a column; None means causal and no padding.
        options: how the model makes logits.
    """

    def __init__(self) -> None:
        self._held: tuple[Tensor, Tensor | None, LogitOptions] | None = None

    @property
    def there(self) -> bool:
        """Whether there are any."""
        return self._held is not None

    @property
    def query(self) -> Float[Tensor, "b h g q d"]:
        """Of the newest columns."""
        return self._known[0]

    @property
    def mask(self) -> Bool[Tensor, "b q t"] | None:
        """What they see."""
        return self._known[1]

    @property
    def options(self) -> LogitOptions:
        """Of the model."""
        return self._known[2]

    def tensors(self) -> list[Tensor]:
        """Every tensor it holds on to."""
        return [] if self._held is None else [tensor for tensor in self._held[:2] if tensor is not None]

    def add(self, map: AttentionMap, rows: int | None) -> None:
        """Take in the queries of a pass.

        Args:
            rows: of the newest, that stay; None for all of them.
        """
        query, mask, seen = map.query, map.mask, map.keys.shape[2]
        if self._held is not None:
            earlier, hidden, _ = self._held
            if mask is not None or hidden is not None:
                before = earlier.shape[3]
                hidden = _causal_mask(earlier, seen - query.shape[3]) if hidden is None else hidden
                mask = _causal_mask(query, seen) if mask is None else mask
                mask = torch.cat([functional.pad(hidden, (0, seen - hidden.shape[-1])), mask], dim=1)
                assert mask.shape[1] == before + query.shape[3]
            query = torch.cat([earlier, query], dim=3)
        if rows is not None:
            first = max(0, query.shape[3] - rows)
            # Copies, where they are a part: a view would hold on to all.
            query = query[:, :, :, first:].clone() if first else query
            mask = mask[:, first:].clone() if mask is not None and first else mask
        self._held = query, mask, map.options

    @property
    def _known(self) -> tuple[Tensor, Tensor | None, LogitOptions]:
        assert self._held is not None
        return self._held


def _causal_mask(query: Float[Tensor, "b h g q d"], seen: int) -> Bool[Tensor, "b q t"]:
    columns = torch.arange(seen - query.shape[3], seen, device=query.device)
    return causal(columns, seen).expand(len(query), -1, -1)
