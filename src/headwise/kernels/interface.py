"""Interface: what a kernel is asked and what it answers; one request object each, so that a new term is a new field.

`headwise.kernels.reference` defines what every kernel computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from headwise.types import Bool, Float, Int, LogitOptions, Tensor, UInt8

# Of rows that are numbers; `reference` takes others too.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Coding:
    """How the codes in pages are read.

    A row of d numbers is first multiplied by an orthogonal matrix, then cut into groups of as many channels; number i
    of group j is read as `step[j] * code[i] + least[j]`, and the row as their product with the transposed matrix. With
    4 bits, byte i holds the code of channel i in its low half, and that of channel i + d / 2 in its high one.

    Attributes:
        key_bits, value_bits: of a code, 4 or 8.
        key_steps, value_steps: fp16; of every row the steps of its groups, then the least numbers of its groups.
        key_hadamard, value_hadamard: the matrices, in fp32.
    """

    key_bits: int
    value_bits: int
    key_steps: Float[Tensor, "pages s ks"]
    value_steps: Float[Tensor, "pages s vs"]
    key_hadamard: Float[Tensor, "d d"]
    value_hadamard: Float[Tensor, "e e"]


@dataclass
class Checked:
    """What is known of pages for as long as their tensors are the same.

    Attributes:
        fitting: what they were found to fit, by `headwise.kernels.check`.
        compiled: how they are told to compiled code, but for their `longest`.
    """

    fitting: set[object] = field(default_factory=set)
    compiled: Any = None


@dataclass(frozen=True)
class PageView:
    """What a kernel reads and writes: pages of one layer and whose they are.

    Row i of head (b, h) lies in page `table[b, h, i // s]` at offset `i % s`, for i below `lengths[b, h]`.
    What lies beyond a head's length is undefined and must not be used.

    Attributes:
        keys, values: numbers, or the bytes of codes. Numbers may have any strides, as in a pool that another host
            owns, where keys may lie transposed; all else is dense.
        columns: of every row, what a mask is looked up by; None where there is never a mask.
        scores: accumulated score of every row; None where no rule ranks by it.
        longest: no head is longer; known without asking the device.
        coding: how codes are read; None where the rows are numbers.
        biases: fp16, added to the logits of every row, behind a soft cap; None where there are none.
        checked: shared by views of the same tensors, which are looked at once.
    """

    keys: Float[Tensor, "pages s d"] | UInt8[Tensor, "pages s kc"]
    values: Float[Tensor, "pages s e"] | UInt8[Tensor, "pages s vc"]
    columns: Int[Tensor, "pages s"] | None
    scores: Float[Tensor, "pages s"] | None
    table: Int[Tensor, "b h p"]
    lengths: Int[Tensor, "b h"]
    longest: int
    coding: Coding | None = None
    biases: Float[Tensor, "pages s"] | None = None
    checked: Checked | None = field(default=None, init=False, compare=False)

    def known_by(self, checked: Checked) -> PageView:
        """The same view, which is not looked at again where views of its tensors were; a changed copy is."""
        object.__setattr__(self, "checked", checked)
        return self

    @property
    def page_size(self) -> int:
        """Rows in a page, s."""
        return self.keys.shape[1]

    @property
    def kv_bytes(self) -> int:
        """Bytes of a row's key and value, which attention reads."""
        return (self.keys.shape[2] + self.values.shape[2]) * self.keys.element_size()

    @property
    def capacity(self) -> int:
        """Rows that the pages of a head have room for at most."""
        return self.table.shape[-1] * self.page_size


@dataclass(frozen=True)
class Marks:
    """What is added to logits by column: the query's gate times the column's mark, behind a soft cap.

    Attributes:
        gates: fp32; 0 leaves the logits of a query as they are. Dimensions may be expanded.
        columns: fp32, of the first m columns; 0 leaves a column's logits as they are, as those of all later columns.
            Of an attention map, whose t columns are all there, m is t.
        fresh: fp32, of the fresh rows of a decode step; None where all are 0.
    """

    gates: Float[Tensor, "b h g q"]
    columns: Float[Tensor, "b m"]
    fresh: Float[Tensor, "b f"] | None = None

    def cut(self, queries: slice, fresh: int) -> Marks:
        """For some of the queries, and the first fresh rows."""
        own = None if self.fresh is None else self.fresh[:, :fresh]
        return replace(self, gates=self.gates[..., queries], fresh=own)


@dataclass(frozen=True)
class DecodeRequest:
    """A few query rows over each KV head's own pages and over fresh rows, in one softmax.

    Attributes:
        query: the newest tokens; the q-th last is also the q-th last fresh row.
        pages: kept rows, the exact ones first; n is the sum of what is `longest` in each. All codes are turned by the
            same matrices.
        fresh_keys, fresh_values: rows that are not in the pages yet.
        mask: True where a query may see a column; its last f columns are the fresh rows. None lets every query see
            all kept rows and the fresh rows up to its own.
        options: how the model makes logits.
        with_mass: whether to return the probabilities; they take q x (n + f) numbers per KV head.
        marks: what columns have beside; None where nothing is marked.
    """

    query: Float[Tensor, "b h g q d"]
    pages: Sequence[PageView]
    fresh_keys: Float[Tensor, "b h f d"]
    fresh_values: Float[Tensor, "b h f e"]
    mask: Bool[Tensor, "b q t"] | None
    options: LogitOptions
    with_mass: bool = False
    marks: Marks | None = None


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


@dataclass(frozen=True)
class AppendRequest:
    """Rows to write behind the kept ones of every head, whose `lengths` count them, in place.

    The pages for them must be in the table already. Without `real`, nothing waits for the device.

    Attributes:
        pages: the exact rows first, which the new ones join; those of codes only for the increments.
        keys, values: numbers, or codes where there are none to write.
        columns: of the new rows, the same in every sequence.
        real: rows to write, the same in every head; None means all of them.
        scores: of the new rows, where the pages carry scores.
        increments: to add to the scores of the rows already there, over the rows of all pages, n; ignored beyond a
            head's length.
    """

    pages: Sequence[PageView]
    keys: Float[Tensor, "b h f d"] | UInt8[Tensor, "b h f kc"]
    values: Float[Tensor, "b h f e"] | UInt8[Tensor, "b h f vc"]
    columns: Int[Tensor, " f"]
    real: Bool[Tensor, "b f"] | None = None
    scores: Float[Tensor, "b h f"] | None = None
    increments: Float[Tensor, "b h n"] | None = None

    def increments_by_view(self) -> list[Tensor | None]:
        """The increments of the rows of each view; None for each where there are none."""
        if self.increments is None:
            return [None] * len(self.pages)
        if len(self.pages) == 1:
            return [self.increments]
        return list(self.increments.split([view.longest for view in self.pages], dim=-1))


@dataclass(frozen=True)
class AttentionMap:
    """Some query rows over the keys of all columns, before a softmax has been computed.

    Attributes:
        columns: each query row's own column, ascending; None for the newest q of the t columns.
        mask: True where a query may see a key; None means causal.
        options: how the model makes logits.
        marks: what columns have beside; None where nothing is marked.
    """

    query: Float[Tensor, "b h g q d"]
    keys: Float[Tensor, "b h t d"]
    mask: Bool[Tensor, "b q t"] | None
    options: LogitOptions
    columns: Int[Tensor, " q"] | None = None
    marks: Marks | None = None

    def own_columns(self) -> Int[Tensor, " q"]:
        """Each query row's own column."""
        if self.columns is not None:
            return self.columns
        total = self.keys.shape[2]
        return torch.arange(total - self.query.shape[3], total, device=self.keys.device)


@dataclass(frozen=True)
class MassRequest:
    """Weighted sums of the columns of an attention map, in all and inside bands.

    Attributes:
        weights: how much each query row counts.
        positions: of every column, never falling; a key is in the band where the query is less than the width
            ahead of it.
        widths: of the bands, for every sequence.
    """

    map: AttentionMap
    weights: Float[Tensor, "b q"]
    positions: Int[Tensor, "b t"]
    widths: Int[Tensor, "w b"]


@dataclass(frozen=True)
class PeaksRequest:
    """Attention of the newest q columns, and the most that any row of a group would give each column.

    Attributes:
        map: of the newest columns.
        counted: ranges of columns, ascending; a second softmax, whose peaks are asked for, is over these alone.
    """

    map: AttentionMap
    values: Float[Tensor, "b h t e"]
    counted: Sequence[slice]


@dataclass(frozen=True)
class Kernels:
    """One implementation of what `headwise.kernels.reference` defines, function by function.

    Attributes:
        obstacle: why they cannot run on a device; None where they can.
        ragged_decode: attention of a few query rows over pages and fresh rows.
        append: new rows into pages.
        attention: output `[b, h, g, q, e]` of the queries of a map over these values; gradients may not pass through.
        attention_and_mass: the same, and what `column_mass` gives, which may take less time together.
        column_mass: the mass on every column `[b, h, g, t]`, and the part of it inside each band `[w, b, h, g, t]`.
        attention_and_peaks: output `[b, h, g, q, e]`, and the largest probability of each column `[b, h, t]`.
        code_bits: of the codes that they read; None for whatever `headwise.quant.codes` makes.
        instructions: name of the set of vector instructions that they were built for and use here; None for kernels
            that are built once.
    """

    name: str
    obstacle: Callable[[torch.device], str | None]
    ragged_decode: Callable[[DecodeRequest], Decoded]
    append: Callable[[AppendRequest], None]
    attention: Callable[[AttentionMap, Tensor], Tensor]
    attention_and_mass: Callable[[MassRequest, Tensor], tuple[Tensor, Tensor, Tensor]]
    column_mass: Callable[[MassRequest], tuple[Tensor, Tensor]]
    attention_and_peaks: Callable[[PeaksRequest], tuple[Tensor, Tensor]]
    code_bits: frozenset[int] | None = None
    instructions: Callable[[], str] | None = None
