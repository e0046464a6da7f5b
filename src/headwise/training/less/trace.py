"""Trace: what every layer evicts of a passage and what the full cache predicts, as a file and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from headwise.contract import LayerShape
from headwise.files import whole_file
from headwise.types import Float, Int, Tensor


@dataclass(frozen=True)
class EvictionTrace:
    """One passage: a prompt of p tokens, and q that follow it.

    Attributes:
        ids: of the tokens that follow.
        prompt: p.
        every: tokens between two evictions.
        past: keys and values of the prompt by layer, as far as the full cache still holds them.
        gone: by compressed layer, the eviction by which each column went, where the one after the prompt counts 0;
            a column that stays has a number that never comes.
        full: log-probabilities with the full cache.
    """

    ids: Int[Tensor, "1 q"]
    prompt: int
    every: int
    past: dict[int, tuple[Tensor, Tensor]]
    gone: dict[int, Int[Tensor, "h t"]]
    full: Float[Tensor, "q vocabulary"]

    @property
    def stages(self) -> Int[Tensor, " q"]:
        """How many evictions, without the first, each token that follows came after."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) // self.every

    def without_evictions(self) -> EvictionTrace:
        """The same passage with a full cache."""
        never = self.ids.shape[1]
        return replace(self, gone={index: torch.full_like(gone, never) for index, gone in self.gone.items()})

    def save(self, path: Path) -> None:
        """Write it, floats in half precision."""
        tensors = {"ids": self.ids, "full": self.full.half()}
        tensors |= {f"gone.{index}": gone.short() for index, gone in self.gone.items()}
        for index, (keys, values) in self.past.items():
            tensors |= {f"keys.{index}": keys.half(), f"values.{index}": values.half()}
        whole = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        with whole_file(path) as scratch:
            save_file(whole, scratch, {"prompt": str(self.prompt), "every": str(self.every)})

    @classmethod
    def load(cls, path: Path, device: torch.device, dtype: torch.dtype) -> EvictionTrace:
        """What `save` wrote.

        Args:
            dtype: of the model.
        """
        parts: dict[str, dict[int, Tensor]] = {"keys": {}, "values": {}, "gone": {}}
        with safe_open(path, framework="pt", device=str(device)) as file:
            about = file.metadata()
            for name in file.keys():  # noqa: SIM118  # not a dict
                kind, _, index = name.partition(".")
                if index:
                    parts[kind][int(index)] = file.get_tensor(name)
            ids, full = file.get_tensor("ids"), file.get_tensor("full").float()
        past = {index: (keys.to(dtype), parts["values"][index].to(dtype)) for index, keys in parts["keys"].items()}
        gone = {index: gone.long() for index, gone in parts["gone"].items()}
        return cls(ids, int(about["prompt"]), int(about["every"]), past, gone, full)


def trace_bytes(prompt: int, rows: int, layers: Sequence[LayerShape], vocabulary: int) -> int:
    """Bytes that a trace takes as a file, but for its header."""
    numbers = sum(
        prompt * layer.heads * (layer.key_dim + layer.value_dim) + layer.heads * (prompt + rows) for layer in layers
    )
    return 2 * (numbers + rows * vocabulary) + 8 * rows
