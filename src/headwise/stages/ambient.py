"""Ambient: what a thread has set of torch for the moment -> headwise's own work, done the same whatever that is.

What outlives a pass must be usable in the next, which may run under other settings: without gradients, outside of
inference mode and of autocast. Own buffers name their dtype and device, whatever the defaults are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import is_autocast_enabled, is_grad_enabled, is_inference_mode_enabled

# Kinds of devices that autocast may be on for.
_KINDS = ("cpu", "cuda")

_P = ParamSpec("_P")
_R = TypeVar("_R")


@contextmanager
def undisturbed() -> Iterator[None]:
    """While it lasts, no gradients, no inference mode and no autocast."""
    with ExitStack() as stack:
        if is_inference_mode_enabled():
            # It turns gradients on again, so that it must come first.
            stack.enter_context(torch.inference_mode(False))
        if is_grad_enabled():
            stack.enter_context(torch.no_grad())
        for kind in _KINDS:
            if is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def alone(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The function, always called `undisturbed`."""

    @wraps(function)
    def called(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        # In every layer of every step, and in most of them there is nothing to undo: a context would cost as much as
        # some of the work.
        if (
            is_grad_enabled()
            or is_inference_mode_enabled()
            or is_autocast_enabled("cpu")
            or is_autocast_enabled("cuda")
        ):
            with undisturbed():
                return function(*args, **kwargs)
        return function(*args, **kwargs)

    return called


def methods_alone(*names: str) -> Callable[[type[_R]], type[_R]]:
    """A class whose methods of those names are always called `undisturbed`."""

    def changed(owner: type[_R]) -> type[_R]:
        for name in names:
            setattr(owner, name, alone(vars(owner)[name]))
        return owner

    return changed


def autocast_dtype(kind: str) -> torch.dtype | None:
    """What autocast computes attention in on devices of that kind; None where it is off."""
    return torch.get_autocast_dtype(kind) if is_autocast_enabled(kind) else None
