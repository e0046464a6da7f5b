"""1/7 prefill: queries, keys and values of the prompt, pass by pass -> its attention output, and the rows so far."""

from __future__ import annotations

import torch

from headwise.kernels.attention import dense_attention
from headwise.kernels.interface import AttentionMap
from headwise.stages.steered import LayerMarks
from headwise.types import Bool, Float, LogitOptions, Tensor


class PromptRows:
    """Keys and values of a prompt that has not come to its end.

    Args:
        marks: of the layer.

    Attributes:
        held: of every column so far; None before the first pass, and once they are in a store.
    """

    def __init__(self, marks: LayerMarks) -> None:
        self._marks = marks
        self.held: tuple[Tensor, Tensor] | None = None

    @property
    def begun(self) -> bool:
        """Whether a part of the prompt is in, and more is to come."""
        return self.held is not None

    @property
    def rows(self) -> tuple[Float[Tensor, "b h t d"], Float[Tensor, "b h t e"]]:
        """Keys and values of the prompt."""
        assert self.held is not None
        return self.held

    def with_earlier(
        self, keys: Float[Tensor, "b h q d"], values: Float[Tensor, "b h q e"]
    ) -> tuple[Float[Tensor, "b h t d"], Float[Tensor, "b h t e"]]:
        """Keys and values of everything that has come in, and these behind them."""
        if self.held is None:
            return keys, values
        before = self.held
        new = keys.to(before[0].dtype), values.to(before[1].dtype)
        return torch.cat([before[0], new[0]], dim=2), torch.cat([before[1], new[1]], dim=2)

    def attend(
        self,
        query: Float[Tensor, "b h g q d"],
        keys: Float[Tensor, "b h q d"],
        values: Float[Tensor, "b h q e"],
        mask: Bool[Tensor, "b q t"] | None,
        options: LogitOptions,
    ) -> Float[Tensor, "b h g q e"]:
        """Attention of new columns over all that have come in and themselves; nothing is taken in yet."""
        keys, values = self.with_earlier(keys, values)
        # Under autocast, parts of a prompt may come in types of their own.
        map = self._marks.attended(AttentionMap(query.to(keys.dtype), keys, mask, options))
        return dense_attention(map, values).to(query.dtype)

    def add(self, keys: Float[Tensor, "b h q d"], values: Float[Tensor, "b h q e"]) -> None:
        """Take in the newest columns."""
        self.held = self.with_earlier(keys, values)

    def tensors(self) -> list[Tensor]:
        """Every tensor it holds on to."""
        return list(self.held or ())
