"""Saved: rows in pages -> named tensors without slack, as a saved cache has them, and back."""

from __future__ import annotations

import torch

from headwise.store.pages import PagePool
from headwise.store.row_parts import PART_NAMES
from headwise.store.rows import Rows
from headwise.types import Tensor


def save_rows(prefix: str, pool: PagePool) -> dict[str, Tensor]:
    """Lengths of all heads and the parts of all rows, head after head; codes stay codes."""
    rows = pool.rows()
    saved = {prefix + name: content[rows.keep] for name, content in rows.parts.items()}
    return {f"{prefix}lengths": pool.lengths} | saved


def load_rows(prefix: str, state: dict[str, Tensor]) -> Rows:
    """What `save_rows` gave, side by side."""
    lengths = state[f"{prefix}lengths"]
    keep = torch.arange(int(lengths.max()) if lengths.numel() else 0, device=lengths.device) < lengths[:, :, None]
    parts = {}
    for name in PART_NAMES:
        rows = state.get(prefix + name)
        if rows is not None:
            parts[name] = rows.new_zeros(*keep.shape, *rows.shape[1:]).index_put_((keep,), rows)
    return Rows(parts, keep)
