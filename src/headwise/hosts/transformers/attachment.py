"""Attachment: a model and a cache -> the cache sees every forward pass it is part of, for as long as it lives.

What hangs on the model goes with its last cache, and is not copied with the model.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from headwise.errors import ConfigurationError
from headwise.hosts.transformers.attention import PassObserver, active_cache, register_interface
from headwise.hosts.transformers.preparation import forget_preparation, watch_preparation
from headwise.hosts.transformers.switch import switch_off, switch_on


def attach(model: PreTrainedModel, cache: PassObserver) -> None:
    """Let the cache see every forward pass that it is part of, and route the model's attention through it meanwhile."""
    register_interface()
    decoder, handles = model.get_decoder(), []
    # A call of the whole model and one of its decoder alone are both seen; the inner one of a nest does nothing.
    for module in {id(m): m for m in (model, decoder)}.values():
        passes = _Passes(module, decoder.config, weakref.ref(cache))
        handles.append(module.register_forward_pre_hook(_Hook(passes.before), with_kwargs=True))
        handles.append(module.register_forward_hook(_Hook(passes.after), with_kwargs=True, always_call=True))
    watch_preparation(model)
    finalizer = weakref.finalize(cache, _detach, weakref.ref(model), handles)
    finalizer.atexit = False


def _detach(model_of: weakref.ref[PreTrainedModel], handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    model = model_of()
    if model is not None:
        forget_preparation(model)


def _nothing(*_: Any) -> None:
    """What a copy of a hook is."""


class _Hook:
    """A hook as torch calls it; in a copy of the model, or in another process, there is nothing to see."""

    def __init__(self, call: Callable[..., None]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> None:
        self._call(*args)

    def __reduce__(self) -> Any:
        return _unhooked, ()


def _unhooked() -> Callable[..., None]:
    return _nothing


class _Passes:
    """Passes of one module, of which some have that cache."""

    def __init__(self, module: nn.Module, config: Any, cache_of: weakref.ref[PassObserver]) -> None:
        self._parameters = inspect.signature(module.forward).parameters
        # A wrapper may take them as they come: what they are is seen when the decoder is called.
        self._nameless = any(each.kind is each.VAR_POSITIONAL for each in self._parameters.values())
        self._config, self._cache_of = config, cache_of
        self._begun: list[tuple[Any, Any] | None] = []

    def before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Of every pass.

        Raises:
            ConfigurationError: when it is to return attention weights.
        """
        cache = self._cache_of()
        if cache is not None and active_cache.get() is cache:
            # Inside of a pass of ours: one of the decoder, or somebody's plain one, which has nothing to undo.
            self._begun.append(None)
            return
        if args and self._nameless:
            return
        given = kwargs if not args else dict(zip(self._parameters, args, strict=False)) | kwargs
        takes_part = given.get("past_key_values") is cache
        if cache is None or not takes_part:
            return
        if cache.computes_attention and given.get("output_attentions", self._config.output_attentions):
            raise ConfigurationError(
                "output_attentions=True: kept rows give the output of attention, and no weights over all tokens; ask "
                "for them with transformers' own cache, or use_cache=False"
            )
        cache.begin_pass(given.get("input_ids"))
        # A model whose attention is its own alone must not be told that it is ours.
        config = self._config if cache.computes_attention else None
        if config is not None:
            switch_on(config)
        self._begun.append((config, active_cache.set(cache)))

    def after(self, _module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        """Of every pass, also of one that failed."""
        cache = self._cache_of()
        begun = self._begun.pop() if self._begun and active_cache.get() is cache else None
        if begun is None:
            return
        config, token = begun
        active_cache.reset(token)
        if config is not None:
            switch_off(config)
        # There is no output where the pass failed.
        if cache is not None and output is not None:
            cache.end_pass()
