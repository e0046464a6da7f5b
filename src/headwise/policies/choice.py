"""Choice: what is known of the layers at the end of a prompt -> the rule of every head, by equation 1 of FastGen.

The cheapest of a policy's rungs whose retained mass reaches the target; policies with scores choose otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from headwise.policies.size import Size, quota_tokens
from headwise.policies.tokens import Tokens
from headwise.types import Bool, Float, Int, Tensor


@dataclass(frozen=True)
class Selection:
    """How the rule of a head is chosen from its profile (FastGen, equation 1; readings named in `FastGen`)."""

    recovery: int | float | None
    keep: Size | None
    last_rows: int | None
    fold: Literal["min", "mean"]
    criterion: Literal["mass", "l1"]

    @property
    def threshold(self) -> float:
        """Retained mass that is enough, where it is given."""
        recovery = float(self.recovery or 0)
        return (1 + recovery) / 2 if self.criterion == "l1" else recovery


@dataclass(frozen=True)
class FormatLoss:
    """What it costs to store each row of a layer in each of some formats, exact numbers first.

    Attributes:
        lost: share of what dropping the row would lose, from 0 to 1.
        row_bytes: of a row, descending.
        kv_bytes: of the key and the value of an exact row, what a full cache holds of a token.
        now: format that each row has, by index into the policy's precision, -1 for exact ones; None at the end of the
            prompt, when it has none.
    """

    lost: Float[Tensor, "formats b h n"]
    row_bytes: tuple[int, ...]
    kv_bytes: int
    now: Int[Tensor, " n"] | None = None


# Of a head's rows, by which it may grow between two choices.
_SLACK = 0.05


@dataclass(frozen=True)
class Again:
    """How a policy chooses once more among the rows that are held, when more tokens have come.

    Attributes:
        every: tokens that come between two choices, at least.
        queries: the newest, whose attention it looks at.
        remembers: rows carry what the policy's `remember` says of them to later choices, and only queries since the
            last choice are looked at.
        stride: of so many queries that follow one another, one is looked at.
        size: rows of a head, a twentieth of which may come too before the next choice: what a choice costs grows with
            them. None where only `every` counts.
    """

    every: int
    queries: int
    remembers: bool = False
    stride: int = 1
    size: Size | None = None

    def interval(self, seen: int) -> int:
        """Tokens that come until the next choice, after one when so many had been seen."""
        if self.size is None:
            return self.every
        rows = self.size * seen if isinstance(self.size, float) else self.size
        return max(self.every, int(rows * _SLACK))


@dataclass(frozen=True)
class PromptSummary:
    """What is known of a layer at the end of its prompt, or later, to choose by.

    Attributes:
        tokens: the facts, as the last query row sees them.
        score: what each token is worth, where the policy scores them.
        format_loss: of the formats a row may get, where the policy chooses them.
        recovered: mass each rung retains, folded over the group, and
        kept: tokens it keeps; both where a rung has to be chosen.
    """

    tokens: Tokens
    score: Float[Tensor, "b h t"] | None = None
    format_loss: FormatLoss | None = None
    recovered: Float[Tensor, "rungs b h"] | None = None
    kept: Int[Tensor, "rungs b h"] | None = None


@dataclass(frozen=True)
class Choice:
    """What was chosen for the heads of a layer.

    Attributes:
        rung: index of the rule among the policy's rungs.
        tokens: of the prompt that stay, where they were chosen by score.
        formats: of every token that stays, by index into the policy's precision, -1 for exact ones; at a later choice
            never one of more bits than it has. None where the policy leaves that to its precision.
        recovered: mass each rung retains; None where nothing had to be chosen.
        threshold: mass that was enough, infinite where only all of it was; None where nothing had to be chosen.
    """

    rung: Int[Tensor, "b h"]
    tokens: Bool[Tensor, "b h t"] | None = None
    formats: Int[Tensor, "b h t"] | None = None
    recovered: Float[Tensor, "rungs b h"] | None = None
    threshold: Float[Tensor, " b"] | None = None


def first_rung(layer: PromptSummary) -> Int[Tensor, "b h"]:
    """The first rule for every head."""
    batch, heads, _ = layer.tokens.valid.shape
    return torch.zeros(batch, heads, dtype=torch.long, device=layer.tokens.valid.device)


def cheapest_rungs(selection: Selection | None, layers: Sequence[PromptSummary]) -> list[Choice]:
    """The rung of every head that keeps the least of those that retain enough.

    Args:
        selection: None where there is but one rung.
        layers: one, or all of them where the budget is the model's.
    """
    if selection is None:
        return [Choice(first_rung(layer)) for layer in layers]
    threshold = _threshold(selection, layers)
    choices = []
    for layer in layers:
        assert layer.recovered is not None and layer.kept is not None
        rung = _cheapest(layer.recovered, layer.kept, threshold).indices
        choices.append(Choice(rung, recovered=layer.recovered.clamp(max=1), threshold=threshold))
    return choices


def _cheapest(
    recovered: Float[Tensor, "rungs b h"], kept: Int[Tensor, "rungs b h"], threshold: Float[Tensor, " b"]
) -> torch.return_types.min:
    """Tokens and index of the rung that keeps the least of those that retain enough."""
    enough = recovered >= threshold[:, None]
    return kept.masked_fill(~enough, torch.iinfo(kept.dtype).max).min(dim=0)


def _threshold(selection: Selection, layers: Sequence[PromptSummary]) -> Float[Tensor, " b"]:
    """Mass that is enough in each sequence: as asked for, or the most that the budget allows."""
    tokens = layers[0].tokens
    if selection.keep is None:
        # Nothing less than full recovers everything, whatever a sum of floats says.
        enough = torch.inf if selection.recovery is not None and selection.recovery >= 1 else selection.threshold
        return torch.full((len(tokens.prompt),), enough, dtype=torch.float32, device=tokens.prompt.device)
    recovered = torch.cat([layer.recovered for layer in layers if layer.recovered is not None], dim=-1)
    kept = torch.cat([layer.kept for layer in layers if layer.kept is not None], dim=-1)
    budget = quota_tokens(selection.keep, tokens.prompt)[:, 0, 0] * recovered.shape[-1]
    # What is kept grows with the threshold, and changes only where a rung stops being enough.
    candidates = torch.cat([recovered.transpose(0, 1).flatten(1), recovered.new_zeros(recovered.shape[1], 1)], dim=1)
    candidates = candidates.sort(dim=1).values
    low = torch.zeros_like(budget)
    high = torch.full_like(budget, candidates.shape[1])
    while bool((high - low > 1).any()):
        middle = (low + high) // 2
        at = candidates.gather(1, middle.clamp(max=candidates.shape[1] - 1)[:, None])[:, 0]
        fits = _cheapest(recovered, kept, at).values.sum(dim=-1) <= budget
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    return candidates.gather(1, low[:, None])[:, 0]
