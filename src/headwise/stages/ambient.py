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

_P = ParamSpec("_P")
_R = TypeVar("_R")


@contextmanager
def undisturbed() -> Iterator[None]:
    """While it lasts, no gradients, no inference mode and no autocast."""
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            # It turns gradients on again, so that it must come first.
            stack.enter_context(torch.inference_mode(False))
        if torch.is_grad_enabled():
            stack.enter_context(torch.no_grad())
        for kind in autocast_kinds():
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def alone(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The function, always called `undisturbed`."""

    @wraps(function)
    def called(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with undisturbed():
            return function(*args, **kwargs)

    return called


def methods_alone(*names: str) -> Callable[[type[_R]], type[_R]]:
    """A class whose methods of those names are always called `undisturbed`."""

    def changed(owner: type[_R]) -> type[_R]:
        for name in names:
            setattr(owner, name, alone(vars(owner)[name]))
        return owner

    return changed


def autocast_kinds() -> list[str]:
    """Kinds of devices for which autocast is on."""
    return [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]


def autocast_dtype(kind: str) -> torch.dtype | None:
    """What autocast computes attention in on devices of that kind; None where it is off."""
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
