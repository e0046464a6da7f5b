"""Rotary: an embedding whose frequencies follow the length (dynamic NTK, longrope) -> the same, held as it is.

Such an embedding changes itself whenever it is asked for positions beyond those it has seen, and the model goes on with
what it became. What headwise asks for by the way must leave no trace, and must turn as the keys it holds were turned.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_NAME = "forward"


def steady(embedding: nn.Module) -> Callable[..., Any]:
    """What the embedding computes with the frequencies that it has at the time."""
    if not _follows_length(embedding):
        return embedding
    # Without what transformers puts around it to set them anew.
    computes = inspect.unwrap(getattr(type(embedding), _NAME))
    return lambda *args, **kwargs: computes(embedding, *args, **kwargs)


@contextmanager
def steady_embeddings(decoder: nn.Module) -> Iterator[None]:
    """While it lasts, passes find the frequencies as they are, however far they reach, and leave them so."""
    held = [(vars(each), vars(each).get(_NAME), steady(each)) for each in decoder.modules() if _follows_length(each)]
    try:
        for state, _, as_it_is in held:
            state[_NAME] = as_it_is
        yield
    finally:
        for state, before, _ in held:
            del state[_NAME]
            if before is not None:
                state[_NAME] = before


def _follows_length(module: nn.Module) -> bool:
    kinds = getattr(module, "rope_type", None)
    # One, or one for each type of layer.
    every = kinds.values() if isinstance(kinds, dict) else [kinds]
    return any(isinstance(kind, str) and ("dynamic" in kind or kind == "longrope") for kind in every)
