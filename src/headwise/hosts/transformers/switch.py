"""Switch: the configuration of a decoder -> headwise's attention in it, for the thread whose pass it is, for as long.

Whoever else reads a configuration meanwhile, in a pass of the same model with another cache or with none, reads what
it said before. Whenever no pass of ours is under way, a model is as it was also for whoever copies it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from headwise.hosts.transformers.attention import NAME

# Passes under way, and the implementation that comes back after the last of them, of each configuration by its id: it
# is not hashable, and alive while there are passes.
_UNDER_WAY: dict[int, tuple[set[object], str | None]] = {}
_LOCK = threading.Lock()

# The configurations in whose passes this thread is.
_own: ContextVar[tuple[Any, ...]] = ContextVar("headwise_switched", default=())

_PROPERTY = "_attn_implementation"


def switched() -> tuple[Any, ...]:
    """What `switch_back` needs; to be asked for before `switch_on`."""
    return _own.get()


def switch_on(config: Any, owner: object) -> None:
    """Use headwise's attention in this thread from now on, in a pass that belongs to that owner."""
    _tell_threads_apart(type(config))
    with _LOCK:
        owners, _ = _UNDER_WAY.setdefault(id(config), (set(), config._attn_implementation_internal))
        owners.add(owner)
        # Not through the property, which sets the parts of a configuration too.
        config._attn_implementation_internal = NAME
    _own.set((*_own.get(), config))


def switch_back(config: Any, owner: object, before: tuple[Any, ...]) -> None:
    """Undo `switch_on`, as far as it came; once more does nothing."""
    _own.set(before)
    with _LOCK:
        owners, implementation = _UNDER_WAY.get(id(config), ({owner}, None))
        owners.discard(owner)
        if not owners and id(config) in _UNDER_WAY:
            config._attn_implementation_internal = implementation
            del _UNDER_WAY[id(config)]


@contextmanager
def headwise_attention_on(config: Any) -> Iterator[None]:
    """Headwise's attention for a while."""
    owner, before = object(), switched()
    try:
        switch_on(config, owner)
        yield
    finally:
        switch_back(config, owner, before)


def _tell_threads_apart(kind: type) -> None:
    """Let configurations of that class answer each thread by itself what their attention is."""
    owner = next(each for each in kind.__mro__ if _PROPERTY in vars(each))
    found = vars(owner)[_PROPERTY]
    if not isinstance(found, _OfThread):
        setattr(owner, _PROPERTY, _OfThread(_read(found.fget), found.fset, None, found.__doc__))


class _OfThread(property):
    """The property in the place of transformers' own."""


def _read(original: Callable[[Any], str | None]) -> Callable[[Any], str | None]:
    def read(config: Any) -> str | None:
        implementation = original(config)
        # What is compiled looks at what it depends on again before every call; this thread is none of it.
        if torch.compiler.is_dynamo_compiling() or implementation != NAME:
            return implementation
        own = _own.get()
        # In every layer of every pass: the innermost, as a rule.
        if own and (own[-1] is config or any(each is config for each in own)):
            return NAME
        with _LOCK:
            # The pass may have ended since.
            return _UNDER_WAY[id(config)][1] if id(config) in _UNDER_WAY else original(config)

    return read


def _renew_lock() -> None:
    """In a process that was forked: another thread, which is not there, may have held it."""
    global _LOCK
    _LOCK = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)
