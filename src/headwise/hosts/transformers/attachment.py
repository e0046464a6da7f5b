"""Attachment: a model and a cache -> the cache sees every forward pass it is part of, for as long as it lives.

What hangs on the model goes with its last cache, and is not copied with the model.
"""

from __future__ import annotations

import functools
import inspect
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from headwise.errors import CacheStateError, ConfigurationError
from headwise.hosts.transformers.attention import PassObserver, active_cache, register_interface
from headwise.hosts.transformers.decoder import decoder_of
from headwise.hosts.transformers.passes import judged, refuse_broken
from headwise.hosts.transformers.positions import tell_positions
from headwise.hosts.transformers.preparation import forget_preparation, watch_preparation
from headwise.hosts.transformers.switch import switch_back, switch_on, switched
from headwise.types import Tensor

_NAME = "forward"

# A cache may die while another is attached, in the same thread too.
_LOCK = threading.RLock()

# Caches in a pass, by id.
_IN_PASS: dict[int, object] = {}


def attach(model: PreTrainedModel, cache: PassObserver) -> None:
    """Let the cache see every forward pass that it is part of, and route the model's attention through it meanwhile."""
    register_interface()
    decoder = decoder_of(model)
    with _LOCK:
        # A call of the whole model and one of its decoder alone are both seen; the inner one of a nest does nothing.
        for module in (model, decoder):
            found = vars(module).get(_NAME)
            inner = module is not model
            forward = found if isinstance(found, _Forward) else _Forward(module, decoder.config, inner=inner)
            forward.caches.add(cache)
            vars(module)[_NAME] = forward
        watch_preparation(model)
    finalizer = weakref.finalize(cache, _detach, weakref.ref(model), weakref.ref(decoder))
    finalizer.atexit = False


def _detach(model_of: weakref.ref[PreTrainedModel], inner_of: weakref.ref[nn.Module]) -> None:
    with _LOCK:
        for module_of in (model_of, inner_of):
            module = module_of()
            found = None if module is None else vars(module).get(_NAME)
            # A cache that is going may still be counted, and is not met any more.
            if isinstance(found, _Forward) and not list(found.caches):
                del vars(module)[_NAME]
                if found.before is not None:
                    vars(module)[_NAME] = found.before
        model = model_of()
        if model is not None:
            forget_preparation(model)


class _Forward:
    """Stands in the place of a module's forward for as long as it has caches.

    No hooks of torch: those that are called after a pass are not when it was interrupted (`KeyboardInterrupt`).

    Args:
        inner: whether it is the decoder, which a whole model calls.

    Attributes:
        caches: that the module has.
        before: what others had put into the module's place before.
    """

    def __init__(self, module: nn.Module, config: Any, *, inner: bool) -> None:
        self._module, self._config, self._inner = weakref.ref(module), config, inner
        self.__signature__ = inspect.signature(module.forward)
        self._parameters = self.__signature__.parameters
        # A wrapper may take them as they come: what they are is seen when the decoder is called.
        self._nameless = any(each.kind is each.VAR_POSITIONAL for each in self._parameters.values())
        functools.update_wrapper(self, module.forward)
        # It would hold the module, which holds this.
        del vars(self)["__wrapped__"]
        self.caches: weakref.WeakSet[PassObserver] = weakref.WeakSet()
        self.before = vars(module).get(_NAME)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self._module()
        forward = self.before or getattr(type(module), _NAME).__get__(module)
        if args and self._nameless:
            return forward(*args, **kwargs)
        given = kwargs if not args else dict(zip(self._parameters, args, strict=False)) | kwargs
        cache: Any = given.get("past_key_values")
        if cache is None or cache not in self.caches:
            return forward(*args, **kwargs)
        if cache.computes_attention and given.get("output_attentions", self._config.output_attentions):
            raise ConfigurationError(
                "output_attentions=True: kept rows give the output of attention, and no weights over all tokens; ask "
                "for them with transformers' own cache, or use_cache=False"
            )
        if self._inner and kwargs.get("logits_to_keep") and cache.asks_all_queries:
            # Layers that read the keys of others would be asked for these tokens only, and a profile is of all.
            kwargs = {**kwargs, "logits_to_keep": 0}
        if self._inner:
            tell_positions(cache, given.get("position_ids"))
        if active_cache.get() is cache:
            return forward(*args, **kwargs)
        return self._serve(cache, lambda: forward(*args, **kwargs), given.get("input_ids"))

    def _serve(self, cache: PassObserver, forward: Callable[[], Any], input_ids: Tensor | None) -> Any:
        """A pass that the cache is part of; however it ends, what holds during it does not hold any longer."""
        refuse_broken(cache)
        this, outer, own = object(), active_cache.get(), switched()
        # A model whose attention is its own alone must not be told that it is ours.
        config = self._config if cache.computes_attention else None
        try:
            if _IN_PASS.setdefault(id(cache), this) is not this:
                raise CacheStateError("the cache is in a forward pass of another thread; it serves one pass at a time")
            active_cache.set(cache)
            if config is not None:
                switch_on(config, this)
            return judged(cache, forward, input_ids)
        finally:
            try:
                _leave(cache, this, outer, own, config)
            except BaseException:
                # An interruption may fall even here.
                _leave(cache, this, outer, own, config)
                raise

    def __reduce__(self) -> Any:
        # A copy of the model, also in another process, has the method of its class.
        return getattr, (self._module(), _NAME)


def _leave(cache: PassObserver, this: object, outer: PassObserver | None, own: tuple[Any, ...], config: Any) -> None:
    """Back to what was before a pass; once more does nothing."""
    if _IN_PASS.get(id(cache)) is this:
        active_cache.set(outer)
        if config is not None:
            switch_back(config, this, own)
        del _IN_PASS[id(cache)]


def _renew_lock() -> None:
    """In a process that was forked: another thread, which is not there, may have held it."""
    global _LOCK
    _LOCK = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)
