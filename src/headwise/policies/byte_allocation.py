"""Byte allocation: what rows and formats are worth to every head -> both for each, at one price of a byte."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from headwise.policies.choice import FormatLoss
from headwise.policies.tokens import Tokens
from headwise.types import Bool, Float, Int, Tensor

# Halvings of the interval in which the price of a byte is looked for.
_HALVINGS = 40


class ByteAllocation:
    """All heads of the model, and what they take at a price.

    Args:
        scores: of every token, by layer.
        losses: of every format, by layer.
        exact: rows of a head that stay exact whatever its format.
    """

    def __init__(
        self, scores: Sequence[Tensor], tokens: Sequence[Tokens], losses: Sequence[FormatLoss], exact: int
    ) -> None:
        self._layers = [score.shape[1] for score in scores]
        pools = [facts.pool for facts in tokens]
        self._worth = torch.cat([s.masked_fill(~p, -torch.inf) for s, p in zip(scores, pools, strict=True)], dim=1)
        self._ordered = self._worth.sort(dim=-1, descending=True).values.contiguous()
        # What is lost when the rows from each on are dropped; those that are always kept count for nothing here.
        squares = self._ordered.clamp(0, 1).double().square()
        self._lost = torch.nn.functional.pad(squares.flip(-1).cumsum(dim=-1).flip(-1), (0, 1))
        self._losses = torch.cat([loss.losses for loss in losses], dim=-1).double()
        self._bytes = torch.tensor(losses[0].row_bytes, device=squares.device, dtype=torch.float64)[:, None, None]
        self._exact = exact

    def price(self, budget: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """The lowest price of a byte at which no more than the budget is taken."""
        low = torch.zeros_like(budget)
        # At this price a row must be worth more than all attention.
        high = torch.full_like(budget, 2.0 / float(self._bytes.min()))
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            fits = self._taken(middle)[2].sum(dim=-1) <= budget
            low, high = torch.where(fits, low, middle), torch.where(fits, middle, high)
        return high

    def at(self, price: Float[Tensor, " b"]) -> tuple[list[Bool[Tensor, "b h t"]], list[Int[Tensor, "b h"]]]:
        """What every head keeps at that price, by layer; and its format, -1 for exact rows."""
        format, count, _ = self._taken(price)
        order = self._worth.argsort(dim=-1, descending=True, stable=True)
        place = torch.empty_like(order).scatter_(
            -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
        )
        keep = (place < count[..., None]) & (self._worth > -torch.inf)
        return list(keep.split(self._layers, dim=1)), list((format - 1).split(self._layers, dim=1))

    def _taken(self, price: Float[Tensor, " b"]) -> tuple[Int[Tensor, "b h"], Int[Tensor, "b h"], Float[Tensor, "b h"]]:
        """Format, rows and bytes of every head for which loss and price are least."""
        cost = price[:, None] * self._bytes
        count = torch.stack([self._above(least.sqrt()) for least in cost])
        held = count.clamp(max=self._exact) * self._bytes[0] + (count - self._exact).clamp(min=0) * self._bytes
        total = self._losses + self._lost.expand(len(cost), -1, -1, -1).gather(-1, count[..., None])[..., 0]
        format = (total + price[:, None] * held).argmin(dim=0)
        chosen = format[None]
        return format, count.gather(0, chosen)[0], held.gather(0, chosen)[0]

    def _above(self, least: Float[Tensor, "b 1"]) -> Int[Tensor, "b h"]:
        """Rows of every head that are worth at least so much, and more than nothing."""
        # Negative, because a sorted sequence is searched in ascending order.
        wanted = (-least).expand(self._ordered.shape[:2])[..., None].float().contiguous()
        return torch.searchsorted(-self._ordered, wanted, right=True)[..., 0]
