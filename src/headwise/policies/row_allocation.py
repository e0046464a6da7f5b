"""Row allocation: what rows are worth, and what formats cost -> how each row is stored, at one price of a byte."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from headwise.types import Float, Int, Tensor

# Bits of a price that are looked at last, and those of an infinite one.
_LOWER, _INFINITE = 15, 0x7F800000


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
    lost: Float[Tensor, "levels b h n"]
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
        self._steps = [float(high - low) for low, high in pairwise([0, *sizes])]
        # Up to which price of a byte a row is worth each level, 0 for never: `[levels, b, rows of all heads]`.
        self._up_to = torch.cat([_prices(layer, sizes) for layer in layers], dim=-1)

    def price(self, budget: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """The lowest price of a byte at which no more than the budget is taken."""
        # The bits of numbers that are not negative order like the numbers, and are counted instead of being sorted.
        bits = self._up_to.view(torch.int32).clamp(min=0)
        return torch.stack([self._lowest(own, most) for own, most in zip(bits.unbind(dim=1), budget, strict=True)])

    def at(self, price: Float[Tensor, " b"]) -> list[Int[Tensor, "b h n"]]:
        """The level of every row at that price, by layer; 0 for one that is dropped."""
        above_nothing = price.float().clamp(min=torch.finfo(torch.float32).tiny)
        level = (self._up_to >= above_nothing[:, None]).sum(dim=0)
        sizes = [shape[1] * shape[2] for shape in self._shapes]
        return [own.view(shape) for own, shape in zip(level.split(sizes, dim=1), self._shapes, strict=True)]

    def _lowest(self, bits: Int[Tensor, "levels n"], budget: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """That price for one sequence, by the upper bits of prices first, and by the lower ones where it lies."""
        upper, half = bits >> _LOWER, 2**_LOWER
        above = self._from(upper, 2 ** (31 - _LOWER))
        first = (above > budget).sum()
        below = self._from(torch.where(upper == first - 1, bits & (half - 1), half), half)
        second = (below[:half] - below[half] + above.take(first) > budget).sum()
        # A number above 0, so that what is never worth it is never taken; and not above what must be.
        lowest = torch.where(first > 0, (first - 1) * half + second, 1)
        return lowest.clamp(1, _INFINITE).int().view(torch.float32)

    def _from(self, at: Int[Tensor, "levels n"], bins: int) -> Float[Tensor, " up"]:
        """Bytes that are taken at each number or above it, and nothing above all."""
        counts = [
            torch.bincount(own, minlength=bins + 1).double() * step for own, step in zip(at, self._steps, strict=True)
        ]
        total: Tensor = sum(counts[1:], counts[0])
        return total.flip(0).cumsum(dim=0).flip(0)


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
        # What is no number is worth nothing.
        price = (rows.worth * edge).nan_to_num(nan=0.0).masked_fill(rows.least >= level, torch.inf)
        found.append(price.masked_fill(rows.most < level, 0).flatten(1))
    return torch.stack(found)
