"""Rows: a layer -> how many of the rows of its heads are of some kind, and what they take."""

from __future__ import annotations

from collections.abc import Sequence

from headwise.stages.layer import LayerCache
from headwise.types import Kind, Tensor


def kept_media(layer: LayerCache) -> Tensor | None:
    """How many rows of every head stand for images, videos and sounds; None where kinds are not known."""
    if layer.store is None:
        return None
    occupied = layer.store.occupied()
    kinds = layer.log.kinds(layer.store.kept_columns().masked_fill(~occupied, 0))
    return None if kinds is None else (occupied & ((kinds & int(Kind.MEDIA)) != 0)).sum(dim=-1).cpu()


def pinned_bytes(layer: LayerCache) -> int:
    """Bytes of the rows that a user marked."""
    if layer.store is None:
        return 0
    occupied = layer.store.occupied()
    pinned = layer.log.marks.pinned_at(layer.store.kept_columns().masked_fill(~occupied, 0))
    if pinned is None:
        return 0
    rows, formats = (pinned & occupied).sum(dim=(0, 1)), layer.store.row_formats()
    return sum(
        int(rows[formats == at].sum()) * row_bytes for at, row_bytes in enumerate(layer.store.row_bytes, start=-1)
    )


def share_of(some: Sequence[Tensor | None], kept: Sequence[Tensor | None]) -> str:
    """Rows of a kind as a share of those kept, in the layers where the kind is known."""
    pairs = [(m, k) for m, k in zip(some, kept, strict=True) if m is not None]
    return f"{sum(int(m.sum()) for m, _ in pairs) / sum(int(k.sum()) for _, k in pairs if k is not None):.1%}"
