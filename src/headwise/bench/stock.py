"""Stock: what transformers has of its own -> its caches, a twin of a model, and models of a shape."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import chain
from typing import Any, TypeAlias

import torch
from transformers import (
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    QuantizedCache,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from headwise.bench.shapes import Shape
from headwise.errors import ConfigurationError
from headwise.types import Tensor

# For the modules that do not import transformers.
Model: TypeAlias = PreTrainedModel
Tokenizer: TypeAlias = PreTrainedTokenizerBase

# The backends of `QuantizedCache`, in the order "auto" tries them, and the package each needs.
_BACKENDS = {"quanto": "optimum-quanto", "hqq": "hqq"}
_MODULES = {"quanto": "optimum.quanto", "hqq": "hqq"}
QUANTIZED = ("auto", *_BACKENDS, "fp8", "none")


def twin(model: Model) -> Model:
    """A model of the same weights, in the same memory, with an attention setting and hooks of its own; runs `sdpa`."""
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    other = copy.deepcopy(model, memo=shared)
    other.set_attn_implementation("sdpa")
    return other


def dynamic_cache(model: Model) -> Cache:
    """The cache that `generate()` makes when it is given none."""
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def quantized_cache(model: Model, backend: str, bits: int | None = None) -> Cache:
    """transformers' quantized cache with its own defaults.

    Args:
        bits: of a number, for a backend that has a choice; None for the default.

    Raises:
        ConfigurationError: when this release of transformers, or this model, does not take it.
    """
    given = {} if bits is None else {"nbits": bits}
    try:
        return QuantizedCache(backend, model.config.get_text_config(decoder=True), **given)
    except (ValueError, ImportError) as error:
        raise ConfigurationError(str(error).strip().splitlines()[0]) from error


def find_backend(wanted: str) -> tuple[str | None, str | None]:
    """The backend to quantize with, or why there is none; neither for "none".

    Raises:
        ConfigurationError: for an unknown name.
    """
    if wanted not in QUANTIZED:
        raise ConfigurationError(f"unknown quantized cache {wanted!r}; one of {', '.join(QUANTIZED)}")
    if wanted == "none":
        return None, None
    if wanted == "fp8":
        return wanted, None
    choices = list(_BACKENDS) if wanted == "auto" else [wanted]
    for name in choices:
        if _importable(_MODULES[name]):
            return name, None
    return None, f"not installed (pip install {_BACKENDS[choices[0]]})"


def tensors_of(cache: Cache) -> list[Tensor]:
    """Every tensor that a cache of transformers holds, those inside quantized ones instead of them."""
    return [tensor for layer in cache.layers for value in vars(layer).values() for tensor in _plain_tensors(value)]


def random_model(shape: Shape, dtype: torch.dtype, device: torch.device) -> Model:
    """A Llama of that shape with normal random weights, made on the device in that dtype."""
    config = LlamaConfig(**llama_dimensions(shape))
    with torch.device(device):
        model: Model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval()


def llama_dimensions(shape: Shape) -> dict[str, Any]:
    """The shape under the names of a `LlamaConfig`, of any release."""
    return {
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.intermediate,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.positions,
        "tie_word_embeddings": shape.tied,
        "bos_token_id": None,
        "eos_token_id": None,
    }


@contextmanager
def watched_attention(model: Model, watch: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Let every attention of that kind of model go through what `watch` makes of the function."""
    name = model.get_decoder().config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[name] = watch(ALL_ATTENTION_FUNCTIONS[name])
    try:
        yield
    finally:
        # Only the override goes; what is registered stays.
        del ALL_ATTENTION_FUNCTIONS[name]


def _plain_tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if hasattr(value, "__tensor_flatten__"):
            for name in value.__tensor_flatten__()[0]:
                yield from _plain_tensors(getattr(value, name))
        else:
            yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _plain_tensors(item)
    elif isinstance(value, dict):
        yield from _plain_tensors(list(value.values()))


def _importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        # Its parent package is missing.
        return False
