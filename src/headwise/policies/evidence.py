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
        mask: True where such a query sees a column or row; None means causal and no padding, at the end of a prompt.
        position, real: of every column, for all heads (k is 1), or of the rows of each.
        length: real tokens seen, of which the newest has the position before.
        rotation: the layer's rotary embedding; None where it has none that is known.
        repetition_peaks: the largest attention that each token received while the model repeated the prompt, or what
            a gate predicts of it, and later also what it got since; None where the policy did not ask for it.
        row_bytes, kv_bytes: of a row that is stored exactly, and of its key and value alone.
        ahead: gives the largest attention that each token gets from queries of the prompt that are asked behind it;
            None where what is dropped is not mended by such queries.
        ahead_counts: how many times as much that counts as attention of other queries.
        scored, biased: whether rows carry a score, and have a bias, which take bytes.
    """

    query: Float[Tensor, "b h g q d"]
    keys: Float[Tensor, "b h t d"]
    values: Float[Tensor, "b h t e"]
    asked: Bool[Tensor, "b q"]
    query_position: Int[Tensor, "b q"]
    mask: Bool[Tensor, "b q t"] | Bool[Tensor, "b h q t"] | None
    options: LogitOptions
    position: Int[Tensor, "b k t"]
    real: Bool[Tensor, "b k t"]
    length: Int[Tensor, "b 1 1"]
    rotation: Rotation | None
    repetition_peaks: Float[Tensor, "b h t"] | None
    row_bytes: int = 0
    kv_bytes: int = 0
    ahead: Callable[[], Float[Tensor, "b h t"]] | None = None
    ahead_counts: float = 0.0
    scored: bool = False
    biased: bool = False

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
        at, there = self._newest(rows)
        group, dim = self.query.shape[2], self.query.shape[-1]
        heads = self.keys.shape[1]
        index = at[:, None, None, :, None].expand(-1, heads, group, -1, dim)
        query, columns = self.query.gather(3, index), at + self.keys.shape[2] - self.query.shape[3]
        for block in query_blocks(query, self.keys.shape[2]):
            weights = logits_of(query[:, :, :, block], self.keys, self.options)
            if self.mask is None:
                visible = causal(columns[0, block], self.keys.shape[2])[None, None].expand(len(at), -1, -1, -1)
            else:
                mask = self.mask if self.mask.dim() == 4 else self.mask[:, None]
                visible = mask.gather(2, at[:, None, block, None].expand(-1, mask.shape[1], -1, mask.shape[-1]))
            visible = visible & there[:, None, block, None]
            yield probabilities(weights, visible[:, :, None], self.options)

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
