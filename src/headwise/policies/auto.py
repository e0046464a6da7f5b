"""Auto: one budget of bytes -> how many rows each KV head keeps, and at how many bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from headwise.errors import ConfigurationError
from headwise.policies.checks import check_count, check_gate, check_size, check_target
from headwise.policies.choice import Choice, FormatLoss, PromptSummary, first_rung
from headwise.policies.evidence import Evidence
from headwise.policies.peak_attention import PeakAttention
from headwise.policies.registry import register
from headwise.policies.rounding_loss import rounding_loss
from headwise.policies.row_allocation import RowAllocation, RowOptions
from headwise.policies.scored import Rechoosing, RepetitionScored
from headwise.policies.size import Size, whole
from headwise.policies.tokens import Tokens
from headwise.quant.formats import RECENT, SINKS, Precision, RowFormat
from headwise.types import Float, Tensor

_FORMATS = (RowFormat(8, 8), RowFormat(8, 4), RowFormat(4, 4))
_LATER = {8: 0, 4: 2}
# Rows in 8 bits that take what an exact one takes, about.
_LATER_ROWS = 1.75
# Square of the attention that every row counts as having been paid.
_NOTHING = 1e-12


@register("auto")
@dataclass(frozen=True)
class Auto(RepetitionScored):
    """Spends bytes where they save most: on more rows or on more bits, row by row.

    Losses are squared errors of a head's output, relative to its values. A token that is dropped costs the square of
    the most attention that any query paid to it, as `PeakAttention` measures it; one that is stored in fewer bits costs
    a share of that, as much as rounding is expected to. Every row takes what costs least together with the price of its
    bytes, which is one for the whole model, so that no byte would save more elsewhere (Lagrange multipliers as in
    Everett, Operations Research 1963). At later choices rows lose bits, or go, as others become worth more.

    Args:
        recovery: T, from 0 to 1: a token is worth its row at the fewest bits if some query gave it 1 - T of its
            attention.
        ratio: instead of it, bytes of the prompt's rows: as a share of what its keys and values take in a full cache
            of the rows' dtype (float), or as what so many exact rows per KV head take, their columns included (int).
        bytes: instead of both, bytes for each sequence.
        window: newest tokens that are kept, and whose queries count.
        recent: newest rows of a head that stay exact.
        sinks: first tokens, which are kept, and stay exact.
        later_bits: of rows that come after the prompt, when they are no longer recent: 8 or 4. With `of="prompt"` they
            are all kept, and so, whatever they are worth.
        gate: as for `PeakAttention`: whether scores are predicted, not found by a repetition.
        choose_every: tokens between two choices, at least: as many as take, in 8 bits, what 32 exact rows take.

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
    choose_every: int = field(default=round(32 * _LATER_ROWS), kw_only=True)

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
        Rechoosing.__post_init__(self)
        if self.later_bits not in _LATER:
            raise ConfigurationError(f"later_bits must be 8 or 4, got {self.later_bits!r}")

    @property
    def precision(self) -> Precision:
        """What a head may get."""
        return Precision(_FORMATS, self.recent, self.sinks, _LATER[self.later_bits])

    @property
    def query_rows(self) -> int:
        """Those of the window."""
        return self.window

    @property
    def size(self) -> Size | None:
        """As many rows as there would be if all were coded in 8 bits, as those are that come."""
        if self.ratio is None:
            return None
        return self.ratio * _LATER_ROWS if isinstance(self.ratio, float) else int(self.ratio * _LATER_ROWS)

    def with_keep(self, keep: Size) -> Auto:
        """The bytes of so many exact rows instead of what was given."""
        return replace(self, recovery=None, ratio=keep, bytes=None)

    def with_bytes(self, count: int) -> Auto:
        """Bytes for each sequence instead of what was given."""
        return replace(self, recovery=None, ratio=None, bytes=count)

    def score(self, evidence: Evidence) -> Float[Tensor, "b h t"]:
        """As `PeakAttention` measures it."""
        return self._peaks.largest(evidence)

    def score_again(self, evidence: Evidence) -> Float[Tensor, "b h t"]:
        """What rows remember."""
        assert evidence.remembered is not None
        return evidence.remembered

    @property
    def _peaks(self) -> PeakAttention:
        return PeakAttention(recovery=1.0, window=self.window, sinks=self.sinks)

    def format_loss(self, evidence: Evidence) -> FormatLoss:
        """What each format costs every row, exact numbers first, and bytes of a row."""
        lost = rounding_loss(evidence, _FORMATS)
        exact = torch.zeros_like(lost[:1])
        return FormatLoss(torch.cat([exact, lost]), evidence.row_bytes, evidence.kv_bytes, evidence.stored)

    def choose(self, layers: Sequence[PromptSummary]) -> list[Choice]:
        """Rows, and the format of each, at one price for a byte; rows that are codes keep their bits, or lose some."""
        losses = [layer.format_loss for layer in layers if layer.format_loss is not None]
        first, tokens = losses[0], layers[0].tokens
        # Levels count in bytes, formats in bits that are given up.
        sizes = first.row_bytes[::-1]
        options = [self._options(layer, loss) for layer, loss in zip(layers, losses, strict=True)]
        allocation = RowAllocation(options, sizes)
        if self.recovery is not None:
            # A row at the fewest bits is worth its bytes from here on.
            worth = (1 - self.recovery) ** 2 / sizes[0]
            price = torch.full((len(tokens.prompt),), worth, dtype=torch.float64, device=tokens.prompt.device)
        else:
            heads = sum(loss.lost.shape[2] for loss in losses)
            price = allocation.price(self._budget(tokens, heads, first.kv_bytes, first.row_bytes[0]))
        choices = []
        for layer, loss, level in zip(layers, losses, allocation.at(price), strict=True):
            # What is kept for other reasons stays as it is.
            other = 0 if loss.now is None else loss.now
            formats = torch.where(level > 0, len(_FORMATS) - level, other)
            choices.append(Choice(first_rung(layer), tokens=level > 0, formats=formats))
        return choices

    def _options(self, layer: PromptSummary, loss: FormatLoss) -> RowOptions:
        """What can become of the rows of a layer."""
        tokens, exact = layer.tokens, len(_FORMATS) + 1
        assert layer.score is not None
        first = tokens.position < self.sinks
        # Of rows that nobody asks for the newest are the last to go.
        least_worth = _NOTHING * (1 + tokens.position / tokens.seen)
        pinned, numbers = first | (tokens.age < self.window), first | (tokens.age < self.recent)
        least = pinned.long().masked_fill(pinned & numbers, exact)
        most = torch.full_like(least, exact) if loss.now is None else (len(_FORMATS) - loss.now).expand_as(least)
        nothing = ~tokens.pool
        return RowOptions(
            layer.score.clamp(0, 1).square().maximum(least_worth),
            torch.cat([loss.lost[1:].flip(0).masked_fill(numbers, 1), loss.lost[:1]]),
            least.minimum(most).masked_fill(nothing, 0),
            most.masked_fill(nothing, 0),
        )

    def _budget(self, tokens: Tokens, heads: int, kv_bytes: int, row_bytes: int) -> Float[Tensor, " b"]:
        """Bytes of a sequence, for rows of all heads of the model."""
        count = whole(tokens, self.of)[:, 0, 0].double()
        if self.bytes is not None:
            return torch.full_like(count, self.bytes)
        assert self.ratio is not None
        if isinstance(self.ratio, float):
            return count * self.ratio * heads * kv_bytes
        return torch.full_like(count, self.ratio * heads * row_bytes)
