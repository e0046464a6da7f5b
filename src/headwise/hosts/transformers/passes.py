"""Passes: a cache and what is done with it -> the same, and an error where something before was broken off half-way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from transformers import DynamicLayer
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer

from headwise.errors import CacheStateError, HeadwiseError, InputError
from headwise.hosts.transformers.attention import PassObserver
from headwise.hosts.transformers.layer import HeadwiseLayer
from headwise.stages.admit import check_batch
from headwise.stages.layer import LayerCache
from headwise.types import Int, Tensor

_BROKEN = "the last forward pass was broken off half-way: reset() the cache and start again"

_P = ParamSpec("_P")
_R = TypeVar("_R")


def refuse_broken(cache: PassObserver) -> None:
    """Refuse a cache that something left half-way.

    Raises:
        CacheStateError: until it is reset.
    """
    if cache.broken:
        raise CacheStateError(_BROKEN)


def judged(cache: PassObserver, forward: Callable[[], _R], input_ids: Tensor | None) -> _R:
    """A pass, after which the cache is broken where it failed and had taken something in."""
    seen, begun = _columns(cache.layers), False
    if input_ids is not None:
        _check_ids(input_ids, cache.layers, max(seen, default=0))
    try:
        cache.begin_pass(input_ids)
        begun = True
        output = forward()
        cache.end_pass()
    except BaseException as error:
        # An interruption may fall between any two lines. Before the pass, what is refused changes nothing.
        if not isinstance(error, Exception if begun else HeadwiseError) or (begun and _changed(cache.layers, seen)):
            cache.broken = True
        raise
    cache.newest = None if input_ids is None else input_ids[:, -1].clone()
    return output


def _check_ids(input_ids: Tensor, layers: Sequence[CacheLayerMixin], seen: int) -> None:
    """Refuse what models and layers of transformers' own answer with an error about shapes.

    Raises:
        InputError: saying what was given.
    """
    if not input_ids.numel():
        told = f"; the cache has seen {seen}, and needs all ids so far and at least one more" if seen else ""
        raise InputError(f"this pass brings no tokens: its input_ids have shape {tuple(input_ids.shape)}{told}")
    for layer in layers:
        store = getattr(layer.core, "store", None) if isinstance(layer, HeadwiseLayer) else None
        if store is not None:
            check_batch(len(input_ids), store.heads[0])
            return


def check_continuation(cache: PassObserver, input_ids: Tensor, count: int) -> str | None:
    """Look at the ids that `generate` was given for a cache; returns what is doubtful about them.

    Args:
        count: how many of them the model is to read; less than one where they end before what was seen.

    Raises:
        CacheStateError: when something was broken off; that comes first.
        InputError: when there is nothing to read.
    """
    refuse_broken(cache)
    seen, columns = max(_columns(cache.layers), default=0), input_ids.shape[1]
    if count < 1:
        raise InputError(
            f"the cache has seen {seen} tokens, and generate() was given {columns}: pass the ids of the whole "
            "conversation and what is new of it, crop() what is to be read again, or reset() the cache"
        )
    newest, cache.newest = cache.newest, None
    # One token more is what every step of a generation brings.
    if newest is None or count < 2 or columns != seen + count or len(input_ids) != len(newest):
        return None
    if torch.equal(input_ids[:, seen - 1], newest.to(input_ids.device)):
        return None
    return (
        f"the cache has seen {seen} tokens, and the ids that generate() was given do not begin with them: their first "
        f"{seen} are not read; reset() the cache for another prompt"
    )


def whole_or_broken(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """A method that is refused on a broken cache, and that breaks the cache where it is broken off itself."""

    @wraps(method)
    def called(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        cache: Any = args[0]
        refuse_broken(cache)
        cache.newest = None
        try:
            return method(*args, **kwargs)
        except (HeadwiseError, OSError):
            # Said before anything changes, or by a disk.
            raise
        except BaseException:
            cache.broken = True
            raise

    return called


def methods_whole(*names: str) -> Callable[[type[_R]], type[_R]]:
    """A class whose methods of those names are `whole_or_broken`, and whose `reset` makes it whole."""

    def changed(owner: type[_R]) -> type[_R]:
        for name in names:
            setattr(owner, name, whole_or_broken(vars(owner)[name]))
        reset = vars(owner)["reset"]

        @wraps(reset)
        def renewed(cache: Any) -> None:
            cache.broken = True
            reset(cache)
            cache.broken, cache.newest = False, None

        setattr(owner, "reset", renewed)  # noqa: B010  # a class of any kind
        return owner

    return changed


def _waits(layer: CacheLayerMixin) -> bool:
    """Whether not all attention was computed over the new keys of a layer."""
    return isinstance(layer, HeadwiseLayer) and (layer.awaits_attention or layer.core.readers_left > 0)


def _columns(layers: Sequence[CacheLayerMixin]) -> set[int]:
    """How many columns layers that count them have seen."""
    return {
        layer.get_seq_length()
        for layer in layers
        if isinstance(layer, HeadwiseLayer) or (isinstance(layer, DynamicLayer) and layer.is_initialized)
    }


def _changed(layers: Sequence[CacheLayerMixin], seen: set[int]) -> bool:
    """Whether any layer may have taken something in since they had seen that much."""
    # Running states do not tell; other layers are not known.
    telling = all(isinstance(each, HeadwiseLayer | DynamicLayer) for each in layers)
    telling = telling and not any(isinstance(each, LinearAttentionLayer) for each in layers)
    waits = any(_waits(layer) for layer in layers)
    return not telling or waits or _columns(layers) != seen


def check_pass(layers: Sequence[CacheLayerMixin]) -> None:
    """Refuse a pass over layers that have not seen the same.

    Raises:
        CacheStateError: when the last pass was broken off.
    """
    if len(_columns(layers)) > 1 or any(_waits(layer) for layer in layers):
        raise CacheStateError(_BROKEN)


def chunk_doubt(core: LayerCache, input_ids: Int[Tensor, "b q"] | None) -> str | None:
    """What is doubtful about the second pass, where it looks like more of a prompt that was taken to be complete."""
    taken_for_whole = core.plan is not None and core.config.cache.prompt_columns is None and not core.recording
    if not taken_for_whole or input_ids is None or input_ids.shape[1] == 1:
        return None
    return (
        f"the first {core.seen} tokens were profiled as the whole prompt and more of it seems to follow; with "
        "chunked prefill make the cache with prompt_tokens=input_ids.shape[1]"
    )
