"""Model facts: a model of transformers -> what the stages must know of it: shapes, rotations, output projections."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, DynamicLayer, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from transformers.pytorch_utils import Conv1D

from headwise.contract import LayerFacts, LayerShape, ModelFacts
from headwise.types import Float, Int, Rotation, Tensor

# What transformers' families call the matrix behind attention.
_PROJECTIONS = ("o_proj", "out_proj", "c_proj", "dense", "wo")


def read_facts(model: PreTrainedModel) -> tuple[ModelFacts, list[CacheLayerMixin]]:
    """What the stages must know of a model, and the cache layers that transformers would make for it."""
    config = model.config.get_text_config(decoder=True)
    stock: list[CacheLayerMixin] = DynamicCache(config=config).layers
    modules, rotation_of = _attention_modules(model), _rotations(model)
    layers = tuple(
        LayerFacts(
            # The exact type: its subclasses are layers of other kinds, which stay as they are.
            compressed=type(layer) is DynamicLayer,
            shape=_shape(config, modules.get(index)),
            rotation=rotation_of(_layer_type(config, index)),
        )
        for index, layer in enumerate(stock)
    )
    return ModelFacts(type(model).__name__, model, model.dtype, model.device, layers), stock


def output_projections(model: PreTrainedModel) -> dict[int, Float[Tensor, "hidden inner"]]:
    """The matrix that each attention layer multiplies its heads' outputs with, as far as it is known."""
    found: dict[int, Tensor] = {}
    for module in model.get_decoder().modules():
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


def _attention_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The module of each layer that projects keys, where there is one of the usual kind."""
    modules = [m for m in model.get_decoder().modules() if isinstance(getattr(m, "k_proj", None), nn.Linear)]
    return {module.layer_idx: module for module in modules if isinstance(getattr(module, "layer_idx", None), int)}


def _shape(config: Any, module: Any) -> LayerShape | None:
    """From the layer's own projections where it has them apart, else from the configuration; None where none tells."""
    queries, heads = getattr(config, "num_attention_heads", None), kv_heads(config)
    if not isinstance(queries, int) or heads is None:
        return None
    dim = getattr(config, "head_dim", None) or config.hidden_size // queries
    if module is None:
        return LayerShape(heads, dim, dim)
    own = getattr(module, "head_dim", dim)
    heads = module.k_proj.out_features // own
    values = getattr(module, "v_proj", None)
    return LayerShape(heads, own, values.out_features // heads if isinstance(values, nn.Linear) else own)


def _layer_type(config: Any, index: int) -> str | None:
    types = getattr(config, "layer_types", None)
    return types[index] if types and index < len(types) else None


def _rotations(model: PreTrainedModel) -> Callable[[str | None], Rotation | None]:
    """The model's rotary embedding by type of layer, applied by its own function; None where it has none that is known.

    Vectors come and go as fp32. A scaling that some embeddings carry (YaRN) is part of the turn to a position, and
    taken out again on the way back.
    """
    decoder = model.get_decoder()
    embedding = getattr(decoder, "rotary_emb", None)
    apply = getattr(sys.modules[type(decoder).__module__], "apply_rotary_pos_emb", None)
    if not isinstance(embedding, nn.Module) or apply is None:
        return lambda _: None
    wanted = list(inspect.signature(embedding.forward).parameters)
    if wanted[:2] != ["x", "position_ids"] or list(inspect.signature(apply).parameters)[:4] != ["q", "k", "cos", "sin"]:
        return lambda _: None
    made: dict[str | None, Rotation] = {}

    def of_type(layer_type: str | None) -> Rotation | None:
        if wanted == ["x", "position_ids"]:
            layer_type = None
        elif wanted != ["x", "position_ids", "layer_type"] or layer_type is None:
            return None
        if layer_type not in made:
            made[layer_type] = _rotation(embedding, apply, layer_type)
        return made[layer_type]

    return of_type


def _rotation(embedding: nn.Module, apply: Callable[..., Any], layer_type: str | None) -> Rotation:
    typed = () if layer_type is None else (layer_type,)

    def rotate(vectors: Float[Tensor, "b h n d"], positions: Int[Tensor, "b n"], back: bool) -> Tensor:
        cos, sin = embedding(vectors, positions, *typed)
        if back:
            # The square of the scaling: what a turn there and back multiplies a vector with.
            scaling = (cos[..., :1] ** 2 + sin[..., :1] ** 2)[:1, :1]
            cos, sin = cos / scaling, -sin / scaling
        # Where positions are in a part of a head, it is the first.
        part = vectors[..., : cos.shape[-1]]
        turned: Tensor = apply(part, part, cos, sin)[0]
        return torch.cat([turned, vectors[..., cos.shape[-1] :]], dim=-1)

    return rotate
