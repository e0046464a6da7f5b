"""Stock layers: cache layers as transformers makes them -> their state, to be counted, saved and put back."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers.cache_utils import CacheLayerMixin

from headwise.contract import tensors_of
from headwise.types import Tensor


def stock_tensors(layers: Iterable[CacheLayerMixin]) -> list[Tensor]:
    """Every tensor that they hold on to."""
    return [tensor for layer in layers for tensor in tensors_of(layer)]


def stock_state(layer: CacheLayerMixin) -> tuple[dict[str, Tensor], dict[str, bool | int]]:
    """Everything a layer is made of: tensors, and plain data; None and callables are made anew with the layer."""
    parts: dict[str, Any] = {}
    for name, value in vars(layer).items():
        # Linear layers have states by number.
        parts.update(
            {f"{name}[{key}]": each for key, each in value.items()} if isinstance(value, dict) else {name: value}
        )
    tensors = {name: value for name, value in parts.items() if isinstance(value, Tensor)}
    plain = {name: value for name, value in parts.items() if isinstance(value, bool | int) and name != "record_past"}
    return tensors, plain


def restore_stock(layer: CacheLayerMixin, tensors: dict[str, Tensor], plain: dict[str, bool | int]) -> None:
    """Put back what `stock_state` gave."""
    for name, value in {**plain, **tensors}.items():
        owner, _, key = name.removesuffix("]").partition("[")
        if key:
            getattr(layer, owner)[int(key)] = value
        else:
            setattr(layer, name, value)
    if tensors:
        like = tensors.get("keys", next(iter(tensors.values())))
        layer.dtype, layer.device = like.dtype, like.device


def renew_stock(layer: CacheLayerMixin, fresh: CacheLayerMixin) -> None:
    """Make a layer what a fresh one is; a reset of its own keeps the number of sequences, and 5.17 keeps old keys."""
    vars(layer).clear()
    vars(layer).update(vars(fresh))


@contextmanager
def unchanged(states: Iterable[dict[Any, Any]]) -> Iterator[None]:
    """While it lasts, whatever passes do to those dicts, such as all that layers are made of, is undone at its end."""
    before = [(state, copy.deepcopy(state)) for state in states]
    try:
        yield
    finally:
        for state, content in before:
            state.clear()
            state.update(content)
