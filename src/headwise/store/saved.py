"""Saved: rows in pages -> named tensors without slack, as a saved cache has them, and back."""

from __future__ import annotations

import torch

from headwise.quant.formats import Precision
from headwise.store.pages import PagePool
from headwise.store.row_parts import PART_NAMES
from headwise.store.rows import Rows
from headwise.store.store import RowStore
from headwise.types import Tensor

# What the names of coded pages begin with in a saved cache.
_CODED = "packed"


def save_store(store: RowStore) -> dict[str, Tensor]:
    """What `load_store` needs, without page slack; codes stay codes."""
    state = save_rows("", store.exact)
    for index, part in enumerate(store.coded):
        if part.pool.longest:
            state |= save_rows(f"{_CODED}{index}_", part.pool)
    if store.coded:
        state |= {"formats": store.formats, "unpacked": torch.tensor(store.not_encoded, device="cpu")}
        state |= {"decided": torch.tensor(store.decided, device="cpu")}
    return state


def load_store(state: dict[str, Tensor], *, page_size: int, precision: Precision | None) -> RowStore:
    """A store as `state` described it.

    Raises:
        InputError: when a part of the rows is missing.
    """
    exact = load_rows("", state)
    scored, biased, formats = exact.scores is not None, exact.biases is not None, state.get("formats")
    store = RowStore(exact, page_size=page_size, scored=scored, biased=biased, precision=precision, formats=formats)
    store.exact.fill(exact)
    for index, part in enumerate(store.coded):
        if f"{_CODED}{index}_lengths" in state:
            part.pool.fill(load_rows(f"{_CODED}{index}_", state))
    store.not_encoded, store.decided = (int(state.get(name, 0)) for name in ("unpacked", "decided"))
    return store


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
