"""Evidence: what a layer holds when tokens are chosen -> the attention that policies score them by."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from headwise.kernels.attention import causal, logits_of, probabilities, query_blocks
from headwise.types import Bool, Float, Int, LogitOptions, Rotation, Tensor


@dataclass(frozen=True)
class Evidence:
    """What one layer holds at the end of the prompt, t columns of all heads; or later, t rows of each.

    Attributes:
        query: of the newest q columns; as many as the policy asked for, or more.
        asked, query_position: whether each of these is a real token, and its position.
        mask: True where such a query sees a column, at the end of a prompt; None means causal and no padding.
        position, real: of every column, for all heads (k is 1), or of the rows of each.
        length: real tokens seen, of which the newest has the position before.
        rotation: the layer's rotary embedding; None where it has none that is known.
        repetition_peaks: the largest attention that each token received while the model repeated the prompt, or what
            a gate predicts of it; None where the policy did not ask for it, and at later choices.
        remembered: what each row carries, as the policy's `remember` gave it; None at the end of the prompt. Rows that
            came since the last choice have 0, or what a gate predicts of them.
        read_keys, read_values, read_spans: give `keys`, `values` and `spans`.
        value_dim: channels of a value.
        gates, marks: where attention is steered, what their product adds to the logits: of the query heads, and of each
            column or row; None where it is not.
        row_bytes: of a row that is stored exactly, then of one in each format of the policy's precision.
        kv_bytes: of the key and the value of an exact row alone.
        stored: format that each row has, -1 for an exact one; None at the end of a prompt.
        read_attention: gives the attention of some of the queries, by index, to every row, at a later choice; 0 where
            it is said that there is no such query. None at the end of a prompt, where it is computed from the keys.
        ahead: gives the largest attention that each token gets from queries of the prompt that are asked behind it;
            None where what is dropped is not mended by such queries.
        ahead_counts: how many times as much that counts as attention of other queries.
    """

    query: Float[Tensor, "b h g q d"]
    read_keys: Callable[[], Float[Tensor, "b h t d"]]
    read_values: Callable[[], Float[Tensor, "b h t e"]]
    read_spans: Callable[[], tuple[Float[Tensor, "b h t"], Float[Tensor, "b h t"]]]
    value_dim: int
    asked: Bool[Tensor, "b q"]
    query_position: Int[Tensor, "b q"]
    mask: Bool[Tensor, "b q t"] | None
    options: LogitOptions
    position: Int[Tensor, "b k t"]
    real: Bool[Tensor, "b k t"]
    length: Int[Tensor, "b 1 1"]
    rotation: Rotation | None
    repetition_peaks: Float[Tensor, "b h t"] | None
    remembered: Float[Tensor, "b h t"] | None = None
    gates: Float[Tensor, "h g"] | None = None
    marks: Float[Tensor, "b k t"] | None = None
    row_bytes: tuple[int, ...] = ()
    kv_bytes: int = 0
    stored: Int[Tensor, " t"] | None = None
    read_attention: Callable[[Int[Tensor, "b r"], Bool[Tensor, "b r"]], Float[Tensor, "b h g r t"]] | None = None
    ahead: Callable[[], Float[Tensor, "b h t"]] | None = None
    ahead_counts: float = 0.0

    @property
    def keys(self) -> Float[Tensor, "b h t d"]:
        """Of every column or row, as numbers; made when they are asked for."""
        return self.read_keys()

    @property
    def values(self) -> Float[Tensor, "b h t e"]:
        """Of every column or row, as numbers; made when they are asked for."""
        return self.read_values()

    @property
    def spans(self) -> tuple[Float[Tensor, "b h t"], Float[Tensor, "b h t"]]:
        """How far the numbers of each key, and of each value, lie apart when they are rotated as codes are."""
        return self.read_spans()

    @property
    def added(self) -> Float[Tensor, "b h g t"] | None:
        """What is added to the logits of each column or row where attention is steered; None where it is not."""
        if self.gates is None or self.marks is None:
            return None
        return self.gates[None, :, :, None] * self.marks[:, :, None]

    @property
    def reconstruction(self) -> Float[Tensor, "b h t"] | None:
        """Deprecated: `repetition_peaks` under its former name."""
        warnings.warn("Evidence.reconstruction is now repetition_peaks", DeprecationWarning, stacklevel=2)
        return self.repetition_peaks

    @property
    def age(self) -> Int[Tensor, "b k t"]:
        """Distance of every column or row from the newest token, which has age 0."""
        return self.length - 1 - self.position

    def attention(self, rows: int) -> Iterator[Float[Tensor, "b h g r t"]]:
        """Attention of the last real tokens over all columns, a few rows at a time; 0 for rows there are none of.

        Args:
            rows: how many in all; there are fewer where the prompt is shorter.
        """
        return (attention for _, attention in self.attention_by_query(rows))

    def attention_by_query(self, rows: int) -> Iterator[tuple[Int[Tensor, "b r"], Float[Tensor, "b h g r t"]]]:
        """As `attention`, and from which position; what that is of rows there are none of says nothing."""
        at, there = self._newest(rows)
        positions, read = self.query_position.gather(1, at), self.read_attention or self._over_columns()
        for block in query_blocks(self.query, self.position.shape[-1]):
            if block.start < at.shape[1]:
                yield positions[:, block], read(at[:, block], there[:, block])

    def _over_columns(self) -> Callable[[Int[Tensor, "b r"], Bool[Tensor, "b r"]], Float[Tensor, "b h g r t"]]:
        """What `read_attention` gives, of the columns of a prompt."""
        keys, added = self.keys, self.added
        heads, total, first = keys.shape[1], keys.shape[2], keys.shape[2] - self.query.shape[3]

        def read(at: Int[Tensor, "b r"], there: Bool[Tensor, "b r"]) -> Float[Tensor, "b h g r t"]:
            index = at[:, None, None, :, None].expand(-1, heads, self.query.shape[2], -1, self.query.shape[4])
            weights = logits_of(self.query.gather(3, index), keys, self.options)
            if added is not None:
                weights = weights + added[:, :, :, None]
            if self.mask is None:
                visible = causal(at[0] + first, total)[None].expand(len(at), -1, -1)
            else:
                visible = self.mask.gather(1, at[..., None].expand(-1, -1, total))
            return probabilities(weights, (visible & there[..., None])[:, None, None], self.options)

        return read

    def first_asked(self, rows: int) -> Int[Tensor, " b"]:
        """Position of the first of the last real tokens, so many of them."""
        at, there = self._newest(rows)
        return self.query_position.gather(1, at).masked_fill(~there, torch.iinfo(torch.long).max).amin(dim=1)

    def mean_attention(self, rows: int) -> Float[Tensor, "b h g t"]:
        """The mean over the last real tokens, or over as many as there are."""
        total = sum(block.sum(dim=3) for block in self.attention(rows))
        assert isinstance(total, Tensor)
        return total / self.asked.sum(dim=1).clamp(1, rows)[:, None, None, None]

    def _newest(self, rows: int) -> tuple[Int[Tensor, "b r"], Bool[Tensor, "b r"]]:
        """Index of the last real query rows of each sequence, in order, and whether there is one."""
        order = torch.arange(1, self.asked.shape[1] + 1, device=self.asked.device) * self.asked
        newest = order.topk(min(rows, self.asked.shape[1]), dim=1).values.sort(dim=1).values
        return (newest - 1).clamp(min=0), newest > 0
