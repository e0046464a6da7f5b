"""Whole pages: rows that a policy keeps of a prompt -> as many of every head as fill its pages."""

from __future__ import annotations

import torch

from headwise.types import Bool, Float, Int, Tensor


def pages_of_heads(kept: Int[Tensor, " h"], pages: int, most: int) -> Int[Tensor, " h"]:
    """How many pages every head gets: as near as can be to what it keeps, by the largest remainder.

    Args:
        kept: rows that a policy keeps of each head.
        pages: of all heads, at least one each.
        most: pages that one head can fill.
    """
    share = torch.full_like(kept, most, dtype=torch.float64)
    wants = kept.double().clamp(min=torch.finfo(torch.float64).tiny)
    open_ = torch.ones_like(kept, dtype=torch.bool)
    # Who can fill no more leaves the rest to the others.
    while bool(open_.any()):
        left = max(pages - most * int((~open_).sum()), 0)
        part = wants / wants[open_].sum() * left
        full = open_ & (part >= most)
        if not bool(full.any()):
            share[open_] = part[open_]
            break
        open_ &= ~full
    given = share.floor().long().clamp(1, most)
    while (left := pages - int(given.sum())) != 0:
        # The neediest first; where too many were given, since every head has one, the least needy gives back.
        need = share - given
        movable = given < most if left > 0 else given > 1
        need = need.masked_fill(~movable, -torch.inf if left > 0 else torch.inf)
        at = int(need.argmax() if left > 0 else need.argmin())
        given[at] += 1 if left > 0 else -1
    return given


def rows_in_pages(
    keep: Bool[Tensor, "h t"], score: Float[Tensor, "h t"] | None, pages: Int[Tensor, " h"], page_size: int
) -> list[Int[Tensor, " rows"]]:
    """Of each head the rows that fill its pages, in order: first those that are kept, then the best of the others.

    Args:
        score: what each row is worth; None where newer ones are worth more.
    """
    worth = torch.arange(keep.shape[1], device=keep.device).expand_as(keep) if score is None else score
    best = worth.argsort(dim=1, descending=True, stable=True)
    order = best.gather(1, keep.gather(1, best).to(torch.uint8).argsort(dim=1, descending=True, stable=True))
    return [order[head, : count * page_size].sort().values for head, count in enumerate(pages.tolist())]
