"""Tokens: columns of every (sequence, KV head) -> the facts about them that rules look at."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from headwise.types import Bool, Float, Int, Tensor, UInt8


@dataclass(frozen=True)
class Tokens:
    """The facts about the tokens of every (sequence, KV head) that a rule may look at.

    Attributes:
        position: index among the real tokens of the sequence.
        age: distance from the newest token, in positions; the newest has age 0.
        valid: False where a row only pads a shorter head, or holds a padding token.
        pool: the rows that `rank` orders; the others come last.
        prompt: real tokens of the prompt, n.
        seen: real tokens seen so far, t; equal to `prompt` at the end of prefill.
        kind: bits of `Kind`; None where no tokenizer was given.
        score: accumulated attention mass in fp32, summed over the group; None where no rule ranks by it.
        layer: index of the layer.
        layers: how many the model has.
        chosen: tokens of the prompt that a policy has chosen by its own scores; None while generating.
        pinned: what the user marked, and no policy evicts; None where nothing is.
        memo: what rules have already answered, so that the rungs of a ladder share their common parts.
    """

    position: Int[Tensor, "b h n"]
    age: Int[Tensor, "b h n"]
    valid: Bool[Tensor, "b h n"]
    pool: Bool[Tensor, "b h n"]
    prompt: Int[Tensor, "b 1 1"]
    seen: Int[Tensor, "b 1 1"]
    kind: UInt8[Tensor, "b h n"] | None
    score: Float[Tensor, "b h n"] | None
    layer: int
    layers: int = 1
    chosen: Bool[Tensor, "b h n"] | None = None
    pinned: Bool[Tensor, "b h n"] | None = None
    memo: dict[Any, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def among(self, pool: Bool[Tensor, "b h n"]) -> Tokens:
        """The same tokens, with `rank` ordering only those in `pool`."""
        return replace(self, pool=self.valid & pool, memo={})

    def rank(self, priority: Float[Tensor, "b h n"]) -> Int[Tensor, "b h n"]:
        """Order by descending priority within each head: 0 is the highest, ties go to the earlier position.

        Args:
            priority: fp32, and not NaN.

        Returns:
            the rank of each row among `pool`; rows outside it rank after all of those inside.
        """
        # The bits of a float order like the float once those below the sign are turned round where it is negative,
        # so one integer key holds priority and position. Adding 0 makes minus zero equal to zero.
        bits = (priority + 0.0).view(torch.int32)
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        key = (bits.long() << 32) | (0x7FFFFFFF - self.position.long())
        key = key.masked_fill(~self.pool, torch.iinfo(torch.int64).min)
        # No two keys in the pool are equal, and what is not stable is sorted several times as fast.
        order = key.argsort(dim=-1, descending=True, stable=False)
        places = torch.arange(key.shape[-1], device=key.device).expand_as(order)
        return torch.empty_like(order).scatter_(-1, order, places)
