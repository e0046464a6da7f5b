"""Formats: a store of rows -> how they are stored, of every head in words and over all of them in numbers."""

from __future__ import annotations

from itertools import compress
from typing import Any

import numpy as np
import torch

from headwise.store.store import RowStore

# An array of names, `[batch, KV heads]`.
Names = np.ndarray[Any, np.dtype[Any]]

_EXACT = "exact"


def format_names(store: RowStore) -> Names | None:
    """Formats of each head's older rows, such as "K8V8+K4V4"; None where all rows are exact."""
    if not store.coded:
        return None
    names = [str(part.format) for part in store.coded]
    has = torch.stack([part.pool.lengths > 0 for part in store.coded], dim=-1)
    # A head that has no old rows yet is named by what they will be.
    to_come = [[*names, _EXACT][index] for index in store.formats.flatten().tolist()]
    own = ["+".join(compress(names, row)) for row in has.flatten(0, 1).tolist()]
    chosen: Names = np.array([found or wanted for found, wanted in zip(own, to_come, strict=True)])
    return chosen.reshape(has.shape[:2])


def rows_by_format(store: RowStore) -> dict[str, int]:
    """Rows of all heads by format, exact ones first; nothing where all are exact."""
    parts = [(_EXACT, store.exact.lengths), *((str(part.format), part.pool.lengths) for part in store.coded)]
    return {name: int(lengths.sum()) for name, lengths in parts} if store.coded else {}
