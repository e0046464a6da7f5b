"""Trial: a model that reads a few tokens with transformers' own cache -> how each of its layers uses them.

What a model does is found by its own code, not by its name. Several sequences of two tokens are read, the same two at
other positions, so that keys of the first differ by position alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from headwise.contract import LayerShape
from headwise.errors import UnsupportedModelError
from headwise.hosts.transformers.attention import bystander, register_interface
from headwise.hosts.transformers.decoder import decoder_of
from headwise.hosts.transformers.rotary import steady_embeddings
from headwise.hosts.transformers.switch import headwise_attention_on
from headwise.placement import device_of
from headwise.stages.ambient import undisturbed
from headwise.types import Float, Rotation, Tensor

# Of the first token of each sequence.
POSITIONS = (0, 1, 5, 17)

# Index of the layer whose keys these are.
_OWNER = "headwise_trial_layer"


@dataclass
class LayerTrial:
    """What was seen of one layer.

    Attributes:
        updates: how often it gave keys to the cache.
        readers: modules whose attention took its keys as the cache returned them, in order.
        obstacles: why its attention cannot be computed from kept rows.
        keys, values: of the first token of every sequence, as the cache was given them.
        query_heads: of the attention that last read them.
    """

    updates: int = 0
    readers: list[str] = field(default_factory=list)
    obstacles: list[str] = field(default_factory=list)
    keys: Float[Tensor, "b h 1 d"] | None = None
    values: Float[Tensor, "b h 1 e"] | None = None
    query_heads: int = 0

    @property
    def shape(self) -> LayerShape | None:
        """What it stores of a token."""
        if self.keys is None or self.values is None:
            return None
        return LayerShape(self.keys.shape[1], self.keys.shape[-1], self.values.shape[-1])

    @property
    def obstacle(self) -> str | None:
        """Why its cache cannot be compressed; None where it can."""
        if self.obstacles:
            return self.obstacles[0]
        if self.updates == 0:
            return "it keeps no keys of its own"
        if self.updates > 1:
            return f"it gives keys to the cache {self.updates} times in a pass"
        if not self.readers:
            return "its keys do not come from the cache to transformers' attention interface as they are"
        if len(self.readers) > len(set(self.readers)):
            return f"it computes attention {len(self.readers)} times in a pass"
        return None


_trial: ContextVar[dict[int, LayerTrial] | None] = ContextVar("headwise_trial", default=None)


def try_model(model: PreTrainedModel) -> Mapping[int, LayerTrial]:
    """What was seen of each layer that used the cache, by index.

    Raises:
        UnsupportedModelError: when the model has no weights, or does not read ids with a cache of transformers.
    """
    decoder = decoder_of(model)
    register_interface()
    seen: dict[int, LayerTrial] = {}
    name, takes = type(decoder).__name__, inspect.signature(decoder.forward).parameters
    if "past_key_values" not in takes or "input_ids" not in takes:
        raise UnsupportedModelError(f"{name} takes no cache: its forward pass has no input_ids or no past_key_values")
    device = device_of(decoder.get_input_embeddings())
    if device.type == "meta":
        raise UnsupportedModelError(
            f"{name} has no weights yet: it is on the meta device; load them, or offload them with accelerate, before "
            "a cache is made"
        )
    ids = torch.tensor([[1, 2]], device=device).expand(len(POSITIONS), -1)
    options: dict[str, Any] = {}
    if "position_ids" in takes:
        first = torch.tensor(POSITIONS, device=device)[:, None]
        options["position_ids"] = torch.cat([first, first + 1], dim=1)
    with ExitStack() as stack:
        stack.enter_context(undisturbed())
        stack.enter_context(headwise_attention_on(decoder.config))
        stack.enter_context(steady_embeddings(decoder))
        if decoder.training:
            stack.enter_context(torch.random.fork_rng(devices=[]))
        for variable, value in ((_trial, seen), (bystander, _note)):
            stack.callback(variable.reset, variable.set(value))  # type: ignore[arg-type]  # each its own
        try:
            cache = _WatchedCache(config=decoder.config)
            decoder(input_ids=ids, past_key_values=cache, use_cache=True, **options)
        except Exception as error:
            raise UnsupportedModelError(
                f"{name} does not read a few tokens with transformers' own cache: {type(error).__name__}: {error}"
            ) from error
    if not seen and not any(getattr(layer, "is_initialized", False) for layer in cache.layers):
        raise UnsupportedModelError(f"{name} makes no use of the cache that it is given")
    return seen


class _WatchedCache(DynamicCache):
    """Transformers' own cache, which marks the keys that it returns."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As always."""
        seen = _trial.get()
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if seen is None:
            return keys, values
        layer = seen.setdefault(layer_idx, LayerTrial())
        layer.updates += 1
        layer.keys, layer.values = (rows[:, :, :1].detach().clone() for rows in (key_states, value_states))
        keys, values = keys.view_as(keys), values.view_as(values)
        for rows in (keys, values):
            setattr(rows, _OWNER, layer_idx)
        return keys, values


def _note(
    module: nn.Module,
    query: Float[Tensor, "b heads q d"],
    key: Float[Tensor, "b h t d"],
    value: Float[Tensor, "b h t e"],
    mask: Tensor | None,
    options: Mapping[str, Any],
) -> None:
    """Attention that is about to be computed, where its keys are those of a layer."""
    seen, owner = _trial.get(), getattr(key, _OWNER, None)
    if seen is None or owner is None:
        return
    index, layer = getattr(module, "layer_idx", None), seen[owner]
    layer.query_heads = query.shape[1]
    layer.readers.append(f"layer {index}" if isinstance(index, int) else type(module).__name__)
    layer.obstacles += _obstacles(query, key, value, mask, owner, options)


def _obstacles(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, owner: int, kwargs: Mapping[str, Any]
) -> list[str]:
    found = []
    if getattr(value, _OWNER, None) != owner:
        found.append("its values are changed between cache and attention")
    if query.shape[1] % key.shape[1]:
        found.append(f"{query.shape[1]} query heads do not share {key.shape[1]} KV heads evenly")
    if kwargs.get("position_bias") is not None:
        found.append("it adds a position bias to its logits")
    if mask is not None and mask.shape[1] != 1:
        found.append("its mask differs by head")
    elif mask is not None and mask.dtype != torch.bool:
        hides = mask <= torch.finfo(mask.dtype).min / 2
        if bool((~hides & (mask != 0)).any()):
            found.append("its mask adds a bias to its logits")
    return found


def same_but_for_position(layer: LayerTrial, rotation: Rotation) -> bool:
    """Whether it turns keys at `POSITIONS` to those that the model made there of the same token."""
    if layer.keys is None or layer.keys.is_meta:
        return False
    keys = layer.keys.float()
    at = torch.tensor(POSITIONS, device=keys.device)[:, None]
    try:
        turned = rotation(rotation(keys[:1], at[:1], True).expand_as(keys), at, False)
    except Exception:
        # The model's own code, given what it never gives itself: other channels, or a type of layer it has not.
        return False
    # Models of 16 bits round before and after they turn.
    tolerance = 8 * torch.finfo(layer.keys.dtype).eps * keys.abs().amax() + 1e-5
    return bool((turned - keys).abs().amax() <= tolerance)


def stock_layers(config: Any) -> list[CacheLayerMixin]:
    """The cache layers that transformers would make."""
    layers: list[CacheLayerMixin] = DynamicCache(config=config).layers
    return layers
