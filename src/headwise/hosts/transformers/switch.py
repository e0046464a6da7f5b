"""Switch: the configuration of a decoder -> headwise's attention in it for as long as a pass lasts.

Whenever no pass of ours is under way, a model is as it was for whoever calls it, copies it or reads its configuration.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from headwise.hosts.transformers.attention import NAME

# Passes under way, and the implementation that comes back after the last of them, of each configuration by its id: it
# is not hashable, and alive while there are passes. One for all threads, as the configuration is.
_UNDER_WAY: dict[int, tuple[int, str | None]] = {}
_LOCK = threading.Lock()


def switch_on(config: Any) -> None:
    """Use headwise's attention from now on; each call is to be followed by one of `switch_off`."""
    with _LOCK:
        passes, before = _UNDER_WAY.get(id(config), (0, config._attn_implementation))
        _UNDER_WAY[id(config)] = (passes + 1, before)
        # Not through the property, which sets the parts of a configuration too.
        config._attn_implementation_internal = NAME


def switch_off(config: Any) -> None:
    """Undo the last `switch_on`."""
    with _LOCK:
        passes, before = _UNDER_WAY.pop(id(config))
        if passes > 1:
            _UNDER_WAY[id(config)] = (passes - 1, before)
        else:
            config._attn_implementation_internal = before


@contextmanager
def headwise_attention_on(config: Any) -> Iterator[None]:
    """Headwise's attention for a while."""
    switch_on(config)
    try:
        yield
    finally:
        switch_off(config)
