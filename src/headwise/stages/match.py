"""Match: a filled store, the whole prompt and reference queries -> the same rows with refitted values, and what it won.

Keys are taken as they will be read, so that what few bits do to them is mended too; values are coded last.
"""

from __future__ import annotations

import torch

from headwise.matching.references import References
from headwise.matching.values import HeadRows, refitted, squared_error, targets_of
from headwise.store.rows import Rows
from headwise.store.store import RowStore
from headwise.types import Bool, Float, Int, Rotation, Tensor


def match_values(
    store: RowStore,
    references: References,
    rotation: Rotation,
    keys: Float[Tensor, "b h t d"],
    values: Float[Tensor, "b h t e"],
    positions: Int[Tensor, "b t"],
    real: Bool[Tensor, "b t"],
    ridge: float,
) -> Float[Tensor, "2 b h"]:
    """Refit the values of every head that lost something and gains by it, in place.

    Args:
        rotation: the layer's rotary embedding.
        keys, values: of the whole prompt.
        positions, real: of every column, the latter False for padding.
        ridge: see `refitted`.

    Returns:
        the error of the outputs for queries that were not fitted to, before and after, as a share of the outputs' size
        (root mean squares); 0 for a head that lost nothing.
    """
    query, stored = references.behind(rotation, positions, real.sum(dim=1)), store.rows()
    at = stored.columns.long().masked_fill(~stored.keep, 0)
    own = values.gather(2, at[..., None].expand(*at.shape, values.shape[-1]))
    new, tests = own.float(), {}
    for head in _lossy(store, stored, real):
        counted, there, keep = references.counted[head[0]], real[head[0]], stored.keep[head]
        asked, sinks = query[head][:, counted], references.options.sinks
        sink = None if sinks is None else sinks[head[1]].float()[:, None].expand(asked.shape[:2]).flatten()
        everything = HeadRows(keys[head][there].float(), values[head][there].float())
        fitted_to, tests[head] = targets_of(asked.flatten(0, 1), sink, everything, references.options).split()
        rows = HeadRows(stored.keys[head][keep].float(), own[head][keep].float())
        new[head][keep] = refitted(fitted_to, rows, ridge)
    store.replace_values(new)
    after, errors = store.rows(), torch.zeros(2, *at.shape[:2], dtype=torch.float32, device=keys.device)
    for head, test in tests.items():
        squares = torch.stack([squared_error(test, _of_head(rows, head)) for rows in (stored, after)])
        errors[(slice(None), *head)] = (squares / test.size.clamp(min=torch.finfo(torch.float32).tiny)).sqrt()
    # NaN, as of a model that computes them, is no gain.
    gained = errors[1] < errors[0]
    if not bool(gained.all()):
        store.replace_values(new.where(gained[..., None, None], own.float()))
        errors[1] = errors[1].where(gained, errors[0])
    return errors


def _lossy(store: RowStore, stored: Rows, real: Bool[Tensor, "b t"]) -> list[tuple[int, int]]:
    """The heads that have dropped tokens, or have rows that are codes."""
    kept = stored.keep.sum(dim=-1)
    lossy = (kept < real.sum(dim=1)[:, None]) | (store.formats >= 0 if store.coded else torch.zeros_like(kept) > 0)
    return [(b, h) for b, h in (lossy & (kept > 0)).nonzero().tolist()]


def _of_head(rows: Rows, head: tuple[int, int]) -> HeadRows:
    keep = rows.keep[head]
    return HeadRows(rows.keys[head][keep].float(), rows.values[head][keep].float())
