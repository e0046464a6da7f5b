"""Preparation: what `generate` is going to call a model with -> the same, with the cache that the model let go of.

Models whose rotary embedding changes with the length (longrope) drop their cache where it does, and read all tokens
again. What the cache kept of them was turned otherwise, so it begins again too.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from typing import Any

from transformers import PreTrainedModel

from headwise.errors import CacheStateError, HeadwiseWarning
from headwise.hosts.transformers.attention import PassObserver
from headwise.hosts.transformers.passes import check_continuation

_NAME = "prepare_inputs_for_generation"


class _Preparation:
    """Stands in the place of a model's method for as long as it has caches.

    Attributes:
        caches: that the model has.
        before: what others had put into the model's place before.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = weakref.ref(model)
        self.caches = 0
        self.before = vars(model).get(_NAME)
        # Read by `generate`, to see what it may be given.
        self.__signature__ = inspect.signature(getattr(model, _NAME))

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        model = self._model()
        prepare = self.before or getattr(type(model), _NAME).__get__(model)
        cache = kwargs.get("past_key_values")
        given, count = args[0] if args else kwargs.get("input_ids"), kwargs.get("next_sequence_length")
        # Not said of a prompt that comes in chunks.
        doubt = None
        if isinstance(cache, PassObserver) and given is not None and count is not None:
            doubt = check_continuation(cache, given, count)
        if doubt is not None:
            warnings.warn(doubt, HeadwiseWarning, stacklevel=2)
        prepared: dict[str, Any] = prepare(*args, **kwargs)
        if not isinstance(cache, PassObserver) or prepared.get("past_key_values") is cache:
            return prepared
        if prepared.get("past_key_values") is not None:
            raise CacheStateError(
                f"{type(model).__name__} puts another cache in the place of the one it is given, as PEFT does for "
                "prefix tuning; generate without past_key_values"
            )
        warnings.warn(
            f"{type(model).__name__} lets go of its cache here and reads all tokens again, as it turns them "
            "otherwise from now on; what to keep of them is chosen anew",
            HeadwiseWarning,
            stacklevel=2,
        )
        cache.reset()
        prepared["past_key_values"] = cache
        return prepared

    def __reduce__(self) -> Any:
        # A copy of the model has the method of its class.
        return getattr, (self._model(), _NAME)


def watch_preparation(model: PreTrainedModel) -> None:
    """Take note of one cache more."""
    found = vars(model).get(_NAME)
    if not isinstance(found, _Preparation):
        if not hasattr(model, _NAME):
            return
        found = vars(model)[_NAME] = _Preparation(model)
    found.caches += 1


def forget_preparation(model: PreTrainedModel) -> None:
    """Take note of one cache less; without any, the model has its own method."""
    found = vars(model).get(_NAME)
    if not isinstance(found, _Preparation):
        return
    found.caches -= 1
    if found.caches:
        return
    del vars(model)[_NAME]
    if found.before is not None:
        vars(model)[_NAME] = found.before
