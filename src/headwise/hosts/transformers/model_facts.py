"""Model facts: a model of transformers -> what the stages must know of it: shapes, rotations, output projections."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import DynamicLayer, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, LinearAttentionAndFullAttentionLayer
from transformers.pytorch_utils import Conv1D

from headwise.contract import LayerFacts, ModelFacts
from headwise.hosts.transformers.adapters import check_adapter
from headwise.hosts.transformers.decoder import decoder_of
from headwise.hosts.transformers.rotary import steady
from headwise.hosts.transformers.trial import LayerTrial, same_but_for_position, stock_layers, try_model
from headwise.placement import device_of
from headwise.types import Float, Int, Rotation, Tensor

# What transformers' families call the matrix behind attention.
_PROJECTIONS = ("o_proj", "out_proj", "c_proj", "dense", "wo")


# Of every decoder that a cache was made for: what was found out about its layers.
_KNOWN: WeakKeyDictionary[nn.Module, tuple[LayerFacts, ...]] = WeakKeyDictionary()


def read_facts(model: PreTrainedModel) -> tuple[ModelFacts, list[CacheLayerMixin]]:
    """What the stages must know of a model, and the cache layers that transformers would make for it.

    The first time a model is asked about, it reads a few tokens.

    Raises:
        UnsupportedModelError: when it does not read ids with a cache of transformers.
    """
    check_adapter(model)
    config, decoder = model.config.get_text_config(decoder=True), decoder_of(model)
    stock = stock_layers(config)
    if decoder not in _KNOWN:
        tried, rotations_of = try_model(model), _rotations(model)
        # Keys that are the same at all positions have no rotation, but only where positions are known to be told: to a
        # model that counts by itself, as none of its layers shows, they may be turned all the same.
        told = any(each.keys is not None and not same_but_for_position(each, _unturned) for each in tried.values())
        unturned = [_unturned] if told else []
        _KNOWN[decoder] = tuple(
            _layer_facts(layer, tried.get(index, LayerTrial()), [*rotations_of(_layer_type(config, index)), *unturned])
            for index, layer in enumerate(stock)
        )
    return ModelFacts(type(model).__name__, model, model.dtype, device_of(decoder), _KNOWN[decoder]), stock


def keeps_every_token(layer: CacheLayerMixin) -> bool:
    """Whether a layer of transformers holds all that was read, and perhaps a state beside it."""
    # The exact type: subclasses are layers of other kinds, which stay as they are.
    return type(layer) in (DynamicLayer, LinearAttentionAndFullAttentionLayer)


def _layer_facts(layer: CacheLayerMixin, trial: LayerTrial, rotations: Sequence[Rotation]) -> LayerFacts:
    full = keeps_every_token(layer)
    obstacle = trial.obstacle if full else None
    rotation = next((each for each in rotations if same_but_for_position(trial, each)), None)
    readers = max(1, len(trial.readers))
    return LayerFacts(full and obstacle is None, trial.shape, rotation, obstacle, readers, trial.query_heads)


def output_projections(model: PreTrainedModel) -> dict[int, Float[Tensor, "hidden inner"]]:
    """The matrix that each attention layer multiplies its heads' outputs with, as far as it is known."""
    found: dict[int, Tensor] = {}
    for module in decoder_of(model).modules():
        index = getattr(module, "layer_idx", None)
        if not isinstance(index, int):
            continue
        for name in _PROJECTIONS:
            projection = getattr(module, name, None)
            if isinstance(projection, nn.Linear | Conv1D):
                weight = projection.weight.detach()
                found[index] = weight.T if isinstance(projection, Conv1D) else weight
    return found


def kv_heads(config: Any) -> int | None:
    """KV heads of a layer, as the configuration of a decoder says or lets infer; None where it does neither."""
    found = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
    return found if isinstance(found, int) else None


def _layer_type(config: Any, index: int) -> str | None:
    types = getattr(config, "layer_types", None)
    return types[index] if types and index < len(types) else None


def _rotations(model: PreTrainedModel) -> Callable[[str | None], list[Rotation]]:
    """What the model's rotary embedding may be, by type of layer, applied by its own function; none where it has none.

    It is that which turns keys as the model does. Vectors come and go as fp32. A scaling that some embeddings carry
    (YaRN) is part of the turn to a position, and taken out again on the way back.
    """
    decoder = decoder_of(model)
    embedding = getattr(decoder, "rotary_emb", None)
    apply = getattr(sys.modules[type(decoder).__module__], "apply_rotary_pos_emb", None)
    if not isinstance(embedding, nn.Module) or apply is None:
        return lambda _: []
    wanted, takes = (list(inspect.signature(of).parameters) for of in (embedding.forward, apply))
    if takes[:4] == ["q", "k", "cos", "sin"]:
        both = apply

        def apply(part: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            turned: Tensor = both(part, part, cos, sin)[0]
            return turned

    elif takes[:3] != ["x", "cos", "sin"]:
        return lambda _: []
    if wanted[:2] != ["x", "position_ids"]:
        return lambda _: []
    made: dict[str | None, list[Rotation]] = {}

    def of_type(layer_type: str | None) -> list[Rotation]:
        if wanted == ["x", "position_ids"]:
            layer_type = None
        elif wanted != ["x", "position_ids", "layer_type"] or layer_type is None:
            return []
        if layer_type not in made:
            # Of all channels, or of as many of the first as there are cosines, each for one channel or for two.
            made[layer_type] = [_rotation(embedding, apply, layer_type, share) for share in (None, 1, 2)]
        return made[layer_type]

    return of_type


def _unturned(vectors: Float[Tensor, "b h n d"], positions: Int[Tensor, "b n"], back: bool) -> Tensor:
    """Of a layer without a rotary embedding."""
    return vectors


def _rotation(embedding: nn.Module, apply: Callable[..., Any], layer_type: str | None, share: int | None) -> Rotation:
    """Rotates all channels; or, where each cosine is for so many, the first ones."""
    typed, cosines = () if layer_type is None else (layer_type,), steady(embedding)

    def rotate(vectors: Float[Tensor, "b h n d"], positions: Int[Tensor, "b n"], back: bool) -> Tensor:
        cos, sin = cosines(vectors, positions, *typed)
        if back:
            # The square of the scaling: what a turn there and back multiplies a vector with.
            scaling = (cos[..., :1] ** 2 + sin[..., :1] ** 2)[:1, :1]
            cos, sin = cos / scaling, -sin / scaling
        end = vectors.shape[-1] if share is None else share * cos.shape[-1]
        part = vectors[..., :end]
        turned: Tensor = apply(part, cos, sin)
        return torch.cat([turned, vectors[..., end:]], dim=-1)

    return rotate
