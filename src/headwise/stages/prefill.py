"""1/7 prefill: keys and values of the prompt, pass by pass -> the rows so far, which the next pass attends to."""

from __future__ import annotations

import torch

from headwise.types import Float, Tensor


class PromptRows:
    """Keys and values of a prompt that has not come to its end.

    Attributes:
        held: of every column so far; None before the first pass, and once they are in a store.
    """

    def __init__(self) -> None:
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

    def add(self, keys: Float[Tensor, "b h q d"], values: Float[Tensor, "b h q e"]) -> None:
        """Take in the newest columns."""
        self.held = self.with_earlier(keys, values)

    def tensors(self) -> list[Tensor]:
        """Every tensor it holds on to."""
        return list(self.held or ())
