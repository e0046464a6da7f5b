"""Stock caches: a model -> the caches that transformers has of its own, and the tensors and bytes that they hold."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from transformers import Cache, DynamicCache, PreTrainedModel, QuantizedCache

from headwise.errors import ConfigurationError
from headwise.report.layer_report import LayerReport
from headwise.types import Tensor

# The backends of `QuantizedCache`, in the order "auto" tries them, and the package each needs.
_BACKENDS = {"quanto": "optimum-quanto", "hqq": "hqq"}
_MODULES = {"quanto": "optimum.quanto", "hqq": "hqq"}
QUANTIZED = ("auto", *_BACKENDS, "fp8", "none")


def dynamic_cache(model: PreTrainedModel) -> Cache:
    """The cache that `generate()` makes when it is given none."""
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def quantized_cache(model: PreTrainedModel, backend: str, bits: int | None = None) -> Cache:
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


def held_by(cache: Cache) -> LayerReport:
    """Bytes that a cache of transformers holds, all of its layers together."""
    return LayerReport.of_stock(tensors_of(cache))


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
