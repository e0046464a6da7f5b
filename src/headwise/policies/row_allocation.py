"""Row allocation: what rows are worth, and what formats cost -> how each row is stored, at one price of a byte."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from headwise.types import Float, Int, Tensor

# Halvings of the interval, of a logarithm, in which the price of a byte is looked for.
_HALVINGS = 40


@dataclass(frozen=True)
class RowOptions:
    """Rows of one layer, and what each of them can become.

    Levels are the formats that a row may be stored in, from that of the fewest bytes to exact numbers.

    Attributes:
        worth: what is lost when a row is dropped.
        lost: share of it that is lost in each level.
        least: level that a row has at least, 0 for one that may be dropped; levels count from 1.
        most: level that a row has at most.
    """

    worth: Float[Tensor, "b h n"]
    lost: Float[Tensor, "levels b h"]
    least: Int[Tensor, "b h n"]
    most: Int[Tensor, "b h n"]


class RowAllocation:
    """Rows of all layers given, and what they take at a price.

    Every row takes the level for which loss and price together are least.

    Args:
        layers: of rows.
        sizes: bytes of a row in each level, ascending.
    """

    def __init__(self, layers: Sequence[RowOptions], sizes: Sequence[int]) -> None:
        self._shapes = [layer.worth.shape for layer in layers]
        self._steps = torch.tensor(sizes, dtype=torch.float64).diff(prepend=torch.zeros(1, dtype=torch.float64))
        self._steps = self._steps.to(layers[0].worth.device)
        # Up to which price of a byte a row is worth each level: `[levels, b, rows of all heads]`.
        self._up_to = torch.cat([_prices(layer, sizes) for layer in layers], dim=-1)

    def price(self, budget: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """The lowest price of a byte at which no more than the budget is taken."""
        finite = self._up_to.where(self._up_to < torch.inf, 0)
        high = finite.amax(dim=(0, 2)).clamp(min=1e-30).double().log() + 1
        low = torch.full_like(high, -100.0)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            fits = self.taken(middle.exp()) <= budget
            low, high = torch.where(fits, low, middle), torch.where(fits, middle, high)
        return high.exp()

    def taken(self, price: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Bytes of all rows at that price."""
        return self._steps @ (self._up_to >= price[:, None].float()).sum(dim=-1).double()

    def at(self, price: Float[Tensor, " b"]) -> list[Int[Tensor, "b h n"]]:
        """The level of every row at that price, by layer; 0 for one that is dropped."""
        level = (self._up_to >= price[:, None].float()).sum(dim=0)
        sizes = [shape[1] * shape[2] for shape in self._shapes]
        return [own.view(shape) for own, shape in zip(level.split(sizes, dim=1), self._shapes, strict=True)]


def _prices(rows: RowOptions, sizes: Sequence[int]) -> Float[Tensor, "levels b n"]:
    """Up to which price of a byte each row is worth each level, or a higher one."""
    lost = [torch.ones_like(rows.lost[0]), *rows.lost]
    taken = [0, *sizes]
    found = []
    for level in range(1, len(taken)):
        # The least price at which some level from here on is worth more than all below.
        edges = []
        for high in range(level, len(taken)):
            gains = [(lost[low] - lost[high]) / (taken[high] - taken[low]) for low in range(level)]
            edges.append(torch.stack(gains).amin(dim=0))
        edge = torch.stack(edges).amax(dim=0).clamp(min=0)
        price = rows.worth * edge
        price = price.masked_fill(rows.least >= level, torch.inf).masked_fill(rows.most < level, -torch.inf)
        found.append(price.flatten(1))
    return torch.stack(found)
