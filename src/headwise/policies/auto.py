"""Auto: one budget of bytes -> how many rows each KV head keeps, and at how many bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from headwise.errors import ConfigurationError
from headwise.policies.base import check_target
from headwise.policies.recite import Recite
from headwise.policies.registry import register
from headwise.policies.scored import Damage, Evidence, Repeated, check_gate
from headwise.policies.size import Size, check_count, check_size
from headwise.quant.codes import decode, encode, rotation
from headwise.quant.formats import RECENT, SINKS, Precision, RowFormat
from headwise.store.rows import COLUMN_BYTES
from headwise.types import Bool, Float, Int, Tensor, Tokens

_FORMATS = (RowFormat(8, 8), RowFormat(8, 4), RowFormat(4, 4))
_LATER = {8: 0, 4: 2}

# What a rounding error counts, beside an error as large from dropping a token. Rounding is different for each query,
# head and layer, and averages out; what is dropped is missed by just the queries that need it, in full. The weight was
# found by trying, on other texts than those of the published figures (docs/quantization.md).
_ROUNDING = 0.3

# Halvings of the interval in which the price of a byte is looked for.
_HALVINGS = 40


@register("auto")
@dataclass(frozen=True)
class Auto(Repeated):
    """Spends bytes where they save most: on more rows or on more bits, head by head.

    Losses are squared errors of a head's output, relative to its values. A token that is dropped costs the square of
    the most attention that any query paid to it, as `Recite` measures it. A head in fewer bits costs the mean
    error that rounding makes in what the newest queries get. Every head takes the format and the number of rows for
    which loss and price together are least; the price of a byte is one for the whole model, so that no byte would save
    more elsewhere (Lagrange multipliers as in Everett, Operations Research 1963).

    Args:
        recovery: T, from 0 to 1: a token is worth its row at the fewest bits if some query gave it 1 - T of its
            attention.
        ratio: instead of it, bytes of the prompt's rows: as a share of what its keys and values take in a full cache
            of the rows' dtype (float), or as what so many exact rows per KV head take, their columns included (int).
        bytes: instead of both, bytes for each sequence.
        window: newest tokens that are kept, and whose queries count.
        recent: newest rows of a head that stay exact.
        sinks: first tokens, which are kept, and stay exact.
        later_bits: of rows that come after the prompt, when they are no longer recent: 8, because nothing is known of
            their worth, or 4. The budget is for the prompt alone.
        gate: as for `Recite`: whether scores are predicted, not found by a repetition.

    Raises:
        ConfigurationError: unless exactly one of the first three is given, and all are in range.
    """

    recovery: int | float | None = None
    ratio: Size | None = None
    bytes: int | None = None
    window: int = 64
    recent: int = RECENT
    sinks: int = SINKS
    later_bits: int = 8
    gate: bool | str = False

    def __post_init__(self) -> None:
        given = {n: getattr(self, n) for n in ("recovery", "ratio", "bytes") if getattr(self, n) is not None}
        if len(given) != 1:
            raise ConfigurationError(f"auto takes one of recovery, ratio and bytes, got {given or 'none'}")
        if self.bytes is not None:
            check_count("bytes", self.bytes, 1)
        if self.ratio is not None:
            check_size("ratio", self.ratio)
        if self.recovery is not None:
            check_target("auto", self.recovery, None)
        check_count("window", self.window, 1)
        check_count("recent", self.recent, 0)
        check_count("sinks", self.sinks, 0)
        check_gate(self.gate)
        if self.later_bits not in _LATER:
            raise ConfigurationError(
                f"later_bits must be one of {', '.join(map(str, _LATER))}, got {self.later_bits!r}"
            )

    @property
    def precision(self) -> Precision:
        """What a head may get."""
        return Precision(_FORMATS, self.recent, self.sinks, _LATER[self.later_bits])

    @property
    def query_rows(self) -> int:
        """Those of the window."""
        return self.window

    def with_keep(self, keep: Size) -> Auto:
        """The bytes of so many exact rows instead of what was given."""
        return replace(self, recovery=None, ratio=keep, bytes=None)

    def with_bytes(self, count: int) -> Auto:
        """Bytes for each sequence instead of what was given."""
        return replace(self, recovery=None, ratio=None, bytes=count)

    def score(self, evidence: Evidence) -> Float[Tensor, "b h t"]:
        """As `Recite` has it."""
        return Recite(recovery=1.0, window=self.window, sinks=self.sinks).score(evidence)

    def damage(self, evidence: Evidence) -> Damage:
        """What each format costs, exact rows first: the loss of each head, and bytes of a row."""
        keys, values, window = evidence.keys, evidence.values.float(), self.window
        age = evidence.length - 1 - evidence.position
        exact = ((evidence.position < self.sinks) | (age < self.recent))[..., None]
        read = {bits: torch.where(exact, keys, _coded(keys, bits)) for bits in {f.key_bits for f in _FORMATS}}
        errors = {
            bits: torch.where(exact, 0.0, _coded(values, bits) - values) for bits in {f.value_bits for f in _FORMATS}
        }
        # Sums of squares, over the newest queries, of what outputs are off with those keys, or with those values.
        displaced, misread = dict.fromkeys(read, torch.zeros(())), dict.fromkeys(errors, torch.zeros(()))
        seen = torch.zeros_like(values[..., 0])
        others = (replace(evidence, keys=rows).attention(window) for rows in read.values())
        for before, *after in zip(evidence.attention(window), *others, strict=True):
            seen = seen.maximum(before.amax(dim=(2, 3)))
            for bits, weights in zip(read, after, strict=True):
                displaced[bits] = displaced[bits] + _energy((weights - before) @ values[:, :, None])
            for bits, error in errors.items():
                misread[bits] = misread[bits] + _energy(before @ error[:, :, None])
        assert evidence.reconstruction is not None
        # The newest queries are few: over all that count, errors are taken to grow as what dropping costs does.
        more = _squares(seen.maximum(evidence.reconstruction)) / _squares(seen).clamp(min=1e-9)
        size = _squares((values * evidence.real[:, None, :, None]).flatten(2)) / evidence.length[..., 0]
        queries = evidence.length[..., 0].clamp(1, window) * evidence.query.shape[2]
        weight = _ROUNDING * more / size.clamp(min=1e-9) / queries
        losses = [weight * (displaced[format.key_bits] + misread[format.value_bits]) for format in _FORMATS]
        sizes = [format.row_bytes(keys.shape[-1], values.shape[-1]) for format in _FORMATS]
        return Damage(torch.stack([torch.zeros_like(losses[0]), *losses]), (evidence.row_bytes, *sizes))

    def choose(
        self,
        scores: Sequence[Float[Tensor, "b h t"]],
        tokens: Sequence[Tokens],
        damages: Sequence[Damage],
    ) -> tuple[list[Bool[Tensor, "b h t"]], list[Int[Tensor, "b h"]]]:
        """Rows and formats of every head, at one price for a byte."""
        market = _Market(scores, tokens, damages, self.precision.exact)
        if self.recovery is not None:
            # A row at the fewest bits is worth its bytes from here on.
            price = torch.full(
                (len(scores[0]),), (1 - self.recovery) ** 2 / min(damages[0].row_bytes), dtype=torch.float64
            )
        else:
            price = market.price(self._budget(tokens[0], damages))
        return market.at(price.to(scores[0].device))

    def _budget(self, tokens: Tokens, damages: Sequence[Damage]) -> Float[Tensor, " b"]:
        prompt = tokens.prompt[:, 0, 0].double()
        if self.bytes is not None:
            return torch.full_like(prompt, self.bytes)
        assert self.ratio is not None
        heads, row = sum(damage.losses.shape[-1] for damage in damages), damages[0].row_bytes[0]
        if isinstance(self.ratio, float):
            return prompt * self.ratio * heads * (row - COLUMN_BYTES)
        return torch.full_like(prompt, self.ratio * heads * row)


class _Market:
    """All heads of the model, and what they take at a price.

    Args:
        scores: of every token, by layer.
        damages: of every format, by layer.
        exact: rows of a head that stay exact whatever its format.
    """

    def __init__(
        self, scores: Sequence[Tensor], tokens: Sequence[Tokens], damages: Sequence[Damage], exact: int
    ) -> None:
        self._layers = [score.shape[1] for score in scores]
        pools = [facts.pool for facts in tokens]
        self._worth = torch.cat([s.masked_fill(~p, -torch.inf) for s, p in zip(scores, pools, strict=True)], dim=1)
        self._ordered = self._worth.sort(dim=-1, descending=True).values.contiguous()
        # What is lost when the rows from each on are dropped; those that are always kept count for nothing here.
        squares = self._ordered.clamp(0, 1).double().square()
        self._lost = torch.nn.functional.pad(squares.flip(-1).cumsum(dim=-1).flip(-1), (0, 1))
        self._losses = torch.cat([damage.losses for damage in damages], dim=-1).double()
        self._bytes = torch.tensor(damages[0].row_bytes, device=squares.device, dtype=torch.float64)[:, None, None]
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


def _squares(numbers: Float[Tensor, "b h n"]) -> Float[Tensor, "b h"]:
    return numbers.square().sum(dim=-1)


def _energy(outputs: Float[Tensor, "b h g q e"]) -> Float[Tensor, "b h"]:
    return outputs.square().sum(dim=(2, 3, 4))


def _coded(rows: Float[Tensor, "b h t d"], bits: int) -> Float[Tensor, "b h t d"]:
    """What is read back of rows that were stored as codes."""
    turn = rotation(rows.shape[-1], rows.device)
    return (decode(*encode(rows.float() @ turn, bits, rows.shape[-1]), bits) @ turn.T).to(rows.dtype)
