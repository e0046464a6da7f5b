"""Match: a filled store, and what the whole prompt gives reference queries -> the same rows, mended, and what that won.

Keys are taken as they will be read, so that what few bits do to them is mended too; values are coded last.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from headwise.matching.fit import fitted
from headwise.matching.targets import HeadRows, Targets, squared_error
from headwise.policies.match import Match
from headwise.store.rows import Rows
from headwise.store.store import RowStore
from headwise.types import Bool, Float, Tensor

# How many reference queries a head is fitted to at least; and otherwise, times the square of its rows.
_QUERIES, _WORK = 512, 1e9


def match_rows(
    store: RowStore,
    targets: Mapping[tuple[int, int], Targets],
    keys: Float[Tensor, "b h t d"],
    values: Float[Tensor, "b h t e"],
    real: Bool[Tensor, "b t"],
    match: Match,
    marks: Float[Tensor, "b t"] | None = None,
) -> Float[Tensor, "2 b h"]:
    """Refit the values and biases of every head that lost something and gains by it, in place.

    Args:
        targets: of every sequence and KV head.
        keys, values: of the whole prompt.
        real: of every column, False for padding.
        match: what may be refitted, and how far.
        marks: of every column, where attention is steered.

    Returns:
        the error of the outputs for queries that were not fitted to, before and after, as a share of the outputs' size
        (root mean squares); 0 for a head that lost nothing.
    """
    stored = store.rows()
    at = stored.columns.long().masked_fill(~stored.keep, 0)
    own_keys, own = (rows.gather(2, at[..., None].expand(*at.shape, rows.shape[-1])) for rows in (keys, values))
    of_rows = None if marks is None else marks[:, None].expand(-1, at.shape[1], -1).gather(2, at)
    new, tests = own.to(torch.float32, copy=True), {}
    biases = new.new_zeros(at.shape)
    for head in _lossy(store, stored, real):
        keep = stored.keep[head]
        fitted_to, tests[head] = targets[head].at_most(_enough(int(keep.sum()))).split()
        marked = None if of_rows is None else of_rows[head][keep]
        rows = HeadRows(stored.keys[head][keep].float(), own[head][keep].float(), marks=marked)
        mended = fitted(fitted_to, rows, own_keys[head][keep].float(), float(match.ridge), match.weight_ridge)
        new[head][keep] = mended.values
        if mended.biases is not None:
            biases[head][keep] = mended.biases
    store.replace_values(new)
    after, errors = store.rows(), torch.zeros(2, *at.shape[:2], dtype=torch.float32, device=keys.device)
    for head, test in tests.items():
        squares = torch.stack(
            [
                squared_error(test, _of_head(stored, head, None, of_rows)),
                squared_error(test, _of_head(after, head, biases, of_rows)),
            ]
        )
        errors[(slice(None), *head)] = (squares / test.size.clamp(min=torch.finfo(torch.float32).tiny)).sqrt()
    # NaN, as of a model that computes them, is no gain.
    gained = errors[1] < errors[0]
    if not bool(gained.all()):
        store.replace_values(new.where(gained[..., None, None], own.float()))
        errors[1] = errors[1].where(gained, errors[0])
        biases = biases.where(gained[..., None], 0)
    if bool(biases.any()):
        store.bias(biases)
    return errors


def _enough(kept: int) -> int:
    """How many queries so many rows are fitted to: the more rows, the less there is to mend, and the more it costs."""
    return max(_QUERIES, int(_WORK / max(1, kept) ** 2))


def _lossy(store: RowStore, stored: Rows, real: Bool[Tensor, "b t"]) -> list[tuple[int, int]]:
    """The heads that have dropped tokens, or have rows that are codes."""
    kept = stored.keep.sum(dim=-1)
    lossy = (kept < real.sum(dim=1)[:, None]) | (store.exact.lengths < kept)
    return [(b, h) for b, h in (lossy & (kept > 0)).nonzero().tolist()]


def _of_head(
    rows: Rows, head: tuple[int, int], biases: Float[Tensor, "b h n"] | None, marks: Float[Tensor, "b h n"] | None
) -> HeadRows:
    keep = rows.keep[head]
    beside = (None if each is None else each[head][keep] for each in (biases, marks))
    return HeadRows(rows.keys[head][keep].float(), rows.values[head][keep].float(), *beside)
