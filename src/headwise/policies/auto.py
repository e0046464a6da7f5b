"""Auto: one budget of bytes -> how many rows each KV head keeps, and at how many bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from headwise.errors import ConfigurationError
from headwise.policies.byte_allocation import ByteAllocation
from headwise.policies.checks import check_count, check_gate, check_size, check_target
from headwise.policies.choice import Choice, FormatLoss, PromptSummary, first_rung
from headwise.policies.evidence import Evidence
from headwise.policies.peak_attention import PeakAttention
from headwise.policies.registry import register
from headwise.policies.rounding_loss import rounding_loss
from headwise.policies.scored import Rechoosing, RepetitionScored, side_by_side
from headwise.policies.size import Size, whole
from headwise.policies.tokens import Tokens
from headwise.quant.formats import RECENT, SINKS, Precision, RowFormat
from headwise.types import Float, Tensor

_FORMATS = (RowFormat(8, 8), RowFormat(8, 4), RowFormat(4, 4))
_LATER = {8: 0, 4: 2, None: None}


@register("auto")
@dataclass(frozen=True)
class Auto(RepetitionScored):
    """Spends bytes where they save most: on more rows or on more bits, head by head.

    Losses are squared errors of a head's output, relative to its values. A token that is dropped costs the square of
    the most attention that any query paid to it, as `PeakAttention` measures it. A head in fewer bits costs the mean
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
        later_bits: of rows that come after the prompt, when they are no longer recent: 8 or 4; None for those of the
            head's other rows, or for 8 with `of="prompt"`, where such rows are all kept whatever they are worth.
        gate: as for `PeakAttention`: whether scores are predicted, not found by a repetition.

    Raises:
        ConfigurationError: unless exactly one of the first three is given, and all are in range.
    """

    recovery: int | float | None = None
    ratio: Size | None = None
    bytes: int | None = None
    window: int = 64
    recent: int = RECENT
    sinks: int = SINKS
    later_bits: int | None = None
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
        Rechoosing.__post_init__(self)
        if self.later_bits not in _LATER:
            raise ConfigurationError(f"later_bits must be 8, 4 or None, got {self.later_bits!r}")

    @property
    def precision(self) -> Precision:
        """What a head may get."""
        later = 8 if self.later_bits is None and self.of == "prompt" else self.later_bits
        return Precision(_FORMATS, self.recent, self.sinks, _LATER[later])

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
        """As `PeakAttention` has it."""
        return self._peaks.score(evidence)

    def score_again(self, evidence: Evidence) -> Float[Tensor, "b h t"]:
        """As `PeakAttention` has it."""
        return self._peaks.score_again(evidence)

    @property
    def _peaks(self) -> PeakAttention:
        return PeakAttention(recovery=1.0, window=self.window, sinks=self.sinks)

    def format_loss(self, evidence: Evidence) -> FormatLoss:
        """What each format costs, exact rows first: the loss of each head, and bytes of a row."""
        return rounding_loss(evidence, _FORMATS, self.window, sinks=self.sinks, recent=self.recent)

    def choose(self, layers: Sequence[PromptSummary]) -> list[Choice]:
        """Rows and formats of every head, at one price for a byte."""
        scores = [layer.score for layer in layers if layer.score is not None]
        losses = [layer.format_loss for layer in layers if layer.format_loss is not None]
        allocation = ByteAllocation(scores, [layer.tokens for layer in layers], losses, self.precision.exact)
        if self.recovery is not None:
            # A row at the fewest bits is worth its bytes from here on.
            worth = (1 - self.recovery) ** 2 / min(losses[0].row_bytes)
            price = torch.full((len(scores[0]),), worth, dtype=torch.float64, device="cpu")
        else:
            heads = sum(loss.losses.shape[-1] for loss in losses)
            price = allocation.price(self._budget(layers[0].tokens, heads, losses[0].kv_bytes, losses[0].row_bytes[0]))
        tokens, formats = allocation.at(price.to(scores[0].device))
        return [
            Choice(first_rung(layer), tokens=kept, formats=format)
            for layer, kept, format in zip(layers, tokens, formats, strict=True)
        ]

    def choose_again(self, layers: Sequence[PromptSummary]) -> list[Choice]:
        """The rows that are worth most for the bytes that they take as they are stored."""
        scores = [layer.score for layer in layers if layer.score is not None]
        sizes, kv_bytes = zip(*(layer.row_bytes for layer in layers if layer.row_bytes is not None), strict=True)
        pool = side_by_side([layer.tokens.pool for layer in layers])
        worth = side_by_side(scores)
        taken = side_by_side([size.expand_as(score) for size, score in zip(sizes, scores, strict=True)]).double()
        # What is always kept is worth more than all attention.
        per_byte = torch.where(worth > 1, worth.double(), worth.double().clamp(min=0).square() / taken)
        if self.recovery is not None:
            # Of its own rows: what a sequence keeps does not depend on others.
            fewest = taken.masked_fill(~pool, torch.inf).amin(dim=(1, 2, 3), keepdim=True)
            kept = per_byte >= (1 - self.recovery) ** 2 / fewest
        else:
            heads = sum(score.shape[1] for score in scores)
            budget = self._budget(layers[0].tokens, heads, kv_bytes[0], int(max(size.max() for size in sizes)))
            order = per_byte.masked_fill(~pool, -1).flatten(1).argsort(dim=1, descending=True, stable=True)
            spent = taken.where(pool, 0).flatten(1).gather(1, order).cumsum(dim=1)
            kept = torch.zeros_like(pool.flatten(1)).scatter_(1, order, spent <= budget[:, None]).view_as(pool)
        kept = kept & pool
        return [
            Choice(first_rung(layer), tokens=own[..., : score.shape[-1]])
            for layer, own, score in zip(layers, kept.unbind(dim=1), scores, strict=True)
        ]

    def _budget(self, tokens: Tokens, heads: int, kv_bytes: int, row_bytes: int) -> Float[Tensor, " b"]:
        """Bytes of a sequence, for rows of all heads of the model."""
        count = whole(tokens, self.of)[:, 0, 0].double()
        if self.bytes is not None:
            return torch.full_like(count, self.bytes)
        assert self.ratio is not None
        if isinstance(self.ratio, float):
            return count * self.ratio * heads * kv_bytes
        return torch.full_like(count, self.ratio * heads * row_bytes)
