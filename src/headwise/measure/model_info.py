"""Model info: a model, or the name of a known shape -> its dimensions, as records have them, and bytes there are."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from headwise.contract import LayerShape
from headwise.errors import ConfigurationError, or_nearest
from headwise.hosts.transformers.model_facts import kv_heads

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Shape:
    """Dimensions of a decoder as Llama has them; other families differ by biases, which cost next to nothing.

    Attributes:
        positions: what the model has room for.
        tied: whether the output layer is the embedding.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    positions: int
    tied: bool = False

    @property
    def head_dim(self) -> int:
        """Numbers in a key, and in a value."""
        return self.hidden // self.heads

    @property
    def parameters(self) -> int:
        """How many weights there are."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
        layer = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        embeddings = (1 if self.tied else 2) * self.vocabulary * self.hidden
        return embeddings + self.layers * layer + self.hidden

    def row_bytes(self, dtype: torch.dtype) -> int:
        """Bytes that a full cache holds per token of a sequence."""
        return self.layers * LayerShape(self.kv_heads, self.head_dim, self.head_dim).token_bytes(dtype)


SHAPES = {
    # For tests.
    "tiny": Shape(2, 32, 4, 2, 48, 128, 512, tied=True),
    "smollm2-135m": Shape(30, 576, 9, 3, 1536, 49152, 8192, tied=True),
    "llama-7b": Shape(32, 4096, 32, 32, 11008, 32000, 4096),
    # With the positions of 3.1, whose shape is the same.
    "llama-3-8b": Shape(32, 4096, 32, 8, 14336, 128256, 131072),
    "llama-3.2-1b": Shape(16, 2048, 32, 8, 8192, 128256, 131072, tied=True),
    "qwen2.5-7b": Shape(28, 3584, 28, 4, 18944, 152064, 32768),
    "mistral-7b": Shape(32, 4096, 32, 8, 14336, 32768, 32768),
}


def describe_model(model: PreTrainedModel, name: str, *, random_weights: bool = False) -> dict[str, Any]:
    """A model as records have it: plain values.

    Args:
        name: as the records call it.
        random_weights: whether they were made up.
    """
    config = model.config.get_text_config(decoder=True)
    return {
        "name": name,
        "random_weights": random_weights,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "kv_heads": kv_heads(config),
    }


def query_heads_per_kv_head(config: Any) -> int:
    """Query heads that share a KV head, by the configuration of a decoder."""
    return int(config.num_attention_heads) // (kv_heads(config) or 1)


def positions(model: PreTrainedModel) -> int | None:
    """Tokens that a model has room for; None where its configuration does not say."""
    limit: int | None = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return limit


def find_shape(name: str) -> Shape:
    """The shape of that name.

    Raises:
        ConfigurationError: with the names there are.
    """
    if name not in SHAPES:
        raise ConfigurationError(f"unknown shape {name!r}; one of {', '.join(SHAPES)}" + or_nearest(name, SHAPES))
    return SHAPES[name]


def available_bytes(device: torch.device) -> int:
    """Memory that a new allocation could get there."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            # What the page cache would give up is not "free", but to be had.
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
