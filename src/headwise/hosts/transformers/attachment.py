"""Attachment: a model and a cache -> the model calls headwise's attention for as long as a cache of it lives.

What hangs on the model is its attention setting and two hooks per cache; all of it goes with the caches.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel

from headwise.errors import UnsupportedModelError
from headwise.hosts.transformers.attention import NAME, PassObserver, active_cache, register_interface

# Of every decoder in use: how many caches it has, and the attention it had before the first.
_USERS: WeakKeyDictionary[nn.Module, tuple[int, str]] = WeakKeyDictionary()


def attach(model: PreTrainedModel, cache: PassObserver) -> None:
    """Route the model's attention through headwise and let the cache see every forward pass it is part of.

    Raises:
        UnsupportedModelError: when the model does not take attention functions.
    """
    register_interface()
    decoder = model.get_decoder()
    _switch_on(decoder)
    handles = []
    # A call of the whole model and one of its decoder alone are both seen; the inner one of a nest does nothing.
    for module in {id(m): m for m in (model, decoder)}.values():
        before, after = _hooks(module, weakref.ref(cache))
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True, always_call=True))
    finalizer = weakref.finalize(cache, _detach, weakref.ref(decoder), handles)
    finalizer.atexit = False


def _switch_on(decoder: PreTrainedModel) -> None:
    users, previous = _USERS.get(decoder, (0, decoder.config._attn_implementation))
    if decoder.config._attn_implementation != NAME:
        if not getattr(decoder, "_supports_attention_backend", False):
            raise UnsupportedModelError(f"{type(decoder).__name__} does not take attention functions")
        decoder.set_attn_implementation(NAME)
    _USERS[decoder] = (users + 1, previous)


def _detach(decoder_of: weakref.ref[PreTrainedModel], handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    decoder = decoder_of()
    if decoder is None or decoder not in _USERS:
        return
    users, previous = _USERS[decoder]
    if users > 1:
        _USERS[decoder] = (users - 1, previous)
        return
    del _USERS[decoder]
    if decoder.config._attn_implementation == NAME:
        decoder.set_attn_implementation(previous)


def _hooks(module: nn.Module, cache_of: weakref.ref[PassObserver]) -> tuple[Callable[..., None], Callable[..., None]]:
    signature = inspect.signature(module.forward)
    tokens: list[Any] = []

    def arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return kwargs if not args else signature.bind_partial(*args, **kwargs).arguments

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = cache_of()
        given = arguments(args, kwargs)
        takes_part = given.get("past_key_values") is cache
        nested = active_cache.get() is cache
        if cache is not None and takes_part and not nested:
            cache.begin_pass(given.get("input_ids"))
            tokens.append(active_cache.set(cache))

    def after(_module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        cache = cache_of()
        # An inner call or one without this cache has nothing to undo.
        if tokens and active_cache.get() is cache:
            active_cache.reset(tokens.pop())
            # There is no output where the pass failed.
            if cache is not None and output is not None:
                cache.end_pass()

    return before, after
