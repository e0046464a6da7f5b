"""Sizes: a model's configuration -> bytes of its weights, and of a cache for so many tokens, before it is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from headwise.contract import tensors_of
from headwise.errors import UnsupportedModelError
from headwise.hosts.transformers.model_facts import keeps_every_token

# Tokens that a model without weights reads to see what its cache holds.
_FEW, _MORE = 1, 2


@dataclass(frozen=True)
class LayerSize:
    """What a layer keeps of one sequence.

    Attributes:
        fixed_bytes: however long it is.
        token_bytes: of every token.
        most: tokens that it keeps at most; None for all, which headwise compresses.
    """

    fixed_bytes: int
    token_bytes: int
    most: int | None

    def bytes(self, tokens: int) -> int:
        """Of so many tokens."""
        return self.fixed_bytes + self.token_bytes * (tokens if self.most is None else min(tokens, self.most))


@dataclass(frozen=True)
class ModelSizes:
    """What a model takes.

    Attributes:
        parameters, weight_bytes: of the model in the dtype asked for.
        layers: of its cache.
        work_bytes: of a token while a prompt is read, about: what one layer computes with.
        query_bytes: of a token's queries, in all layers together, about.
        positions: tokens that the model has room for; None where it does not say.
    """

    parameters: int
    weight_bytes: int
    layers: tuple[LayerSize, ...]
    work_bytes: int
    query_bytes: int
    positions: int | None

    @property
    def compressed(self) -> list[LayerSize]:
        """Layers that keep every token."""
        return [layer for layer in self.layers if layer.most is None and layer.token_bytes]

    @property
    def token_bytes(self) -> int:
        """Of a token in these, in a full cache."""
        return sum(layer.token_bytes for layer in self.compressed)

    def full_bytes(self, tokens: int, batch: int) -> int:
        """Of a full cache."""
        return batch * sum(layer.bytes(tokens) for layer in self.layers)

    def held_bytes(self, tokens: int, batch: int, share: float) -> int:
        """Of one in which the layers that keep every token hold so much of it."""
        return self.full_bytes(tokens, batch) - int((1 - share) * batch * tokens * self.token_bytes)

    def reading_bytes(self, tokens: int, batch: int) -> int:
        """What a prompt needs beside the cache while it is read at once, about."""
        return batch * tokens * self.work_bytes


def model_sizes(config: Any, dtype: torch.dtype) -> ModelSizes:
    """Of a model with that configuration, which is made without weights and reads a few tokens.

    Raises:
        UnsupportedModelError: when it cannot be made, or read with, so.
    """
    try:
        with torch.device("meta"), torch.no_grad():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
            few, more = (_layers(model, count) for count in (_FEW, _MORE))
    except Exception as error:
        raise UnsupportedModelError(
            f"how large a cache of {type(config).__name__} is cannot be told before it is loaded "
            f"({type(error).__name__}: {error}); load it and ask cache.report()"
        ) from error
    text = config.get_text_config(decoder=True)
    hidden, inner = text.hidden_size, getattr(text, "intermediate_size", None) or text.hidden_size
    widest = max(inner) if isinstance(inner, list | tuple) else inner
    return ModelSizes(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        weight_bytes=sum(parameter.nbytes for parameter in model.parameters()),
        layers=tuple(_size(layer, least, most) for (layer, least), (_, most) in zip(few, more, strict=True)),
        # The residual and what is normed of it; three times the inner width of a gated layer, or what attention takes.
        work_bytes=dtype.itemsize * (2 * hidden + max(3 * widest, 4 * hidden)),
        query_bytes=dtype.itemsize * hidden * len(few),
        positions=getattr(text, "max_position_embeddings", None),
    )


def _size(layer: Any, few: int, more: int) -> LayerSize:
    of_token = (more - few) // (_MORE - _FEW)
    # A window counts the token that looks.
    most = None if keeps_every_token(layer) else max(0, getattr(layer, "sliding_window", 0) - 1)
    return LayerSize(few - _FEW * of_token, of_token, most)


def _layers(model: Any, count: int) -> list[tuple[Any, int]]:
    """Layers of its cache, and bytes that each holds of one sequence of so many tokens."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    model(input_ids=torch.zeros(1, count, dtype=torch.long, device="meta"), past_key_values=cache, use_cache=True)
    return [(layer, sum(tensor.nbytes for tensor in tensors_of(layer))) for layer in cache.layers]
