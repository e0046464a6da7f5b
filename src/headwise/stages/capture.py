"""Capture: a layer whose prompt is in -> one whose steps are the same operations on the same memory, to be replayed.

Lengths and tables live on the device; what the host must know of a step is noted between two replays.
"""

from __future__ import annotations

from headwise.errors import CacheStateError
from headwise.stages.ambient import alone
from headwise.stages.layer import LayerCache
from headwise.types import Int, Tensor


@alone
def begin_capture(layer: LayerCache, column: Int[Tensor, " 1"], room: int) -> None:
    """From now on every pass is one token.

    Args:
        column: of the new token; on the device, because it differs from step to step.
        room: tokens until `end_capture`.

    Raises:
        CacheStateError: before the whole prompt is in.
    """
    layer.accept()
    if layer.store is None:
        raise CacheStateError("a step can be captured once the prompt is in")
    layer.store.reserve(room)
    layer.store.freeze(True)
    # What is folded in between two replays must be read by the next.
    layer.evicted.allocate(layer.store.lengths.shape, layer.store.value_dim, layer.store.device)
    layer.captured_column = column


@alone
def end_capture(layer: LayerCache) -> None:
    """Back to passes of any kind."""
    layer.captured_column = None
    if layer.store is not None:
        layer.store.freeze(False)


@alone
def advance(layer: LayerCache, spare: int) -> None:
    """Take note that a captured step was replayed, and apply the rules where that is due.

    Args:
        spare: tokens until `end_capture`.
    """
    assert layer.store is not None
    layer.seen += 1
    layer.store.count(1)
    layer.evict_if_due(spare)
