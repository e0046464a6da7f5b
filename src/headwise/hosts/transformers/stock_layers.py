"""Stock layers: cache layers as transformers makes them -> their state, to be counted, saved and put back."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import DynamicLayer
from transformers.cache_utils import CacheLayerMixin

from headwise.contract import tensors_of
from headwise.types import Tensor


def stock_tensors(layers: Iterable[CacheLayerMixin]) -> list[Tensor]:
    """Every tensor that they hold on to."""
    return [tensor for layer in layers for tensor in tensors_of(layer)]


def stock_state(layer: CacheLayerMixin) -> tuple[dict[str, Tensor], dict[str, bool | int]]:
    """Everything a layer is made of: tensors, and plain data; None and callables are made anew with the layer."""
    tensors = {name: value for name, value in vars(layer).items() if isinstance(value, Tensor)}
    plain = {name: v for name, v in vars(layer).items() if isinstance(v, bool | int) and name != "record_past"}
    return tensors, plain


def restore_stock(layer: CacheLayerMixin, tensors: dict[str, Tensor], plain: dict[str, bool | int]) -> None:
    """Put back what `stock_state` gave."""
    for name, value in {**plain, **tensors}.items():
        setattr(layer, name, value)
    if isinstance(tensors.get("keys"), Tensor):
        layer.dtype, layer.device = tensors["keys"].dtype, tensors["keys"].device


def forget_stock(layer: CacheLayerMixin) -> None:
    """What a reset leaves undone: 5.17 fills the old keys with zeros, and then goes on behind them."""
    if isinstance(layer, DynamicLayer):
        layer.keys = layer.values = None
        layer.is_initialized = False


@contextmanager
def unchanged(layers: Iterable[CacheLayerMixin]) -> Iterator[None]:
    """While it lasts, whatever passes do to those layers is undone at its end."""
    before: list[tuple[Any, dict[str, Any]]] = [(layer, copy.deepcopy(vars(layer))) for layer in layers]
    try:
        yield
    finally:
        for layer, state in before:
            vars(layer).clear()
            vars(layer).update(state)
