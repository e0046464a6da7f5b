"""Vocabulary: the axis names and the small records that travel between the stages.

Axes, in every shape of this package:

    b  sequences of the batch          t  columns: every token the model was given, padding included
    h  KV heads                        n  kept rows of a head (padded to the longest head where dense)
    g  query heads per KV head         f  fresh columns: attended to, but not yet in the store
    q  query rows                      d  head dimension of keys, e of values
    p  pages of a head                 s  rows in a page

A *column* is an index into everything the model was given; a *position* counts the real tokens only, so it is
what the same prompt would have alone. Without padding the two are equal.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import IntFlag
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, UInt8
else:
    try:  # Shapes are checked under pytest, where jaxtyping is installed; elsewhere they only document.
        from jaxtyping import Bool, Float, Int, UInt8
    except ImportError:

        class _Shape:
            def __class_getitem__(cls, item: Any) -> Any:
                return item[0]

        Bool = Float = Int = UInt8 = _Shape

__all__ = [
    "Bool",
    "Decoded",
    "Float",
    "Int",
    "Kind",
    "LogitOptions",
    "Packing",
    "PageView",
    "Tensor",
    "Tokens",
    "UInt8",
]


class Kind(IntFlag):
    """What a token is, as a bit set (FastGen, section 3.4)."""

    ORDINARY = 0
    SPECIAL = 1
    PUNCTUATION = 2


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


@dataclass(frozen=True)
class LogitOptions:
    """How a model turns query-key products into logits.

    Attributes:
        scaling: factor on the product.
        softcap: logits become `softcap * tanh(logits / softcap)`; None where the model has no soft cap.
        sinks: one learned logit per query head that joins the softmax and has no value; None where there is none.
    """

    scaling: float
    softcap: float | None = None
    sinks: Float[Tensor, "h g"] | None = None


@dataclass(frozen=True)
class Packing:
    """How the codes in pages are read.

    A row of d numbers is first multiplied by an orthogonal matrix, then cut into groups of as many channels; number i
    of group j is read as `step[j] * code[i] + least[j]`, and the row as their product with the transposed matrix. With
    4 bits, byte i holds the code of channel i in its low half, and that of channel i + d / 2 in its high one.

    Attributes:
        key_bits, value_bits: of a code, 4 or 8.
        key_steps, value_steps: fp16; of every row the steps of its groups, then the least numbers of its groups.
        key_rotation, value_rotation: the matrices, in fp32.
    """

    key_bits: int
    value_bits: int
    key_steps: Float[Tensor, "pages s ks"]
    value_steps: Float[Tensor, "pages s vs"]
    key_rotation: Float[Tensor, "d d"]
    value_rotation: Float[Tensor, "e e"]


@dataclass(frozen=True)
class PageView:
    """What a decode kernel reads: pages of one layer and whose they are.

    Row i of head (b, h) lies in page `table[b, h, i // s]` at offset `i % s`, for i below `lengths[b, h]`.
    What lies beyond a head's length is undefined and must not be used.

    Attributes:
        keys, values: numbers, or the bytes of codes.
        columns: of every row; what a mask is looked up by.
        scores: accumulated score of every row; None where no rule ranks by it.
        longest: no head is longer; known without asking the device.
        packing: how codes are read; None where the rows are numbers.
    """

    keys: Float[Tensor, "pages s d"] | UInt8[Tensor, "pages s kc"]
    values: Float[Tensor, "pages s e"] | UInt8[Tensor, "pages s vc"]
    columns: Int[Tensor, "pages s"]
    scores: Float[Tensor, "pages s"] | None
    table: Int[Tensor, "b h p"]
    lengths: Int[Tensor, "b h"]
    longest: int
    packing: Packing | None = None

    @property
    def capacity(self) -> int:
        """Rows that the pages of a head have room for at most."""
        return self.table.shape[-1] * self.columns.shape[1]


@dataclass(frozen=True)
class Decoded:
    """What came of the attention of a few query rows over pages and fresh rows.

    Attributes:
        output: of every query head, in the values' dtype.
        lse: natural logarithm of the softmax's denominator, the sink logit included, in fp32; minus infinity for
            a row that sees nothing and has no sink.
        on_kept: probability of every kept row, summed over the group, in fp32; 0 beyond a head's length. None
            unless asked for.
        on_fresh: the same for the fresh rows.
    """

    output: Float[Tensor, "b h g q e"]
    lse: Float[Tensor, "b h g q"]
    on_kept: Float[Tensor, "b h q n"] | None
    on_fresh: Float[Tensor, "b h q f"] | None
