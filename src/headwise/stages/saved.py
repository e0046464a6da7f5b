"""Saved: a layer's compressed cache -> named tensors, as a saved cache has them, and back into an empty layer."""

from __future__ import annotations

import torch

from headwise.contract import LayerShape
from headwise.errors import CacheStateError
from headwise.stages.ambient import alone
from headwise.stages.layer import LayerCache
from headwise.stages.plan import Plan
from headwise.store.saved import load_store, save_store
from headwise.types import Tensor


@alone
def save_layer(layer: LayerCache) -> dict[str, Tensor]:
    """Everything that `load_layer` needs, without page slack; empty before the first pass.

    Raises:
        CacheStateError: when the prompt is still coming in.
    """
    layer.accept()
    if layer.prompt.rows.begun:
        raise CacheStateError("cannot save before the whole prompt is in")
    if layer.store is None or layer.plan is None:
        return {}
    counters = torch.tensor([layer.seen, layer.evicted_at, layer.prompt.observations.mass.rows_read], device="cpu")
    own = layer.plan.state() | {"counters": counters} | layer.later.newest.state()
    if layer.config.again is not None:
        own["newest_before"] = torch.tensor(layer.later.newest.before, device="cpu")
    return own | save_store(layer.store) | layer.evicted.state()


@alone
def load_layer(layer: LayerCache, state: dict[str, Tensor]) -> None:
    """Take back what `save_layer` gave, into an empty layer."""
    keys, values, cache = state["keys"], state["values"], layer.config.cache
    layer.seen, layer.evicted_at, layer.prompt.observations.mass.rows_read = state["counters"].tolist()
    layer.full_row_bytes = LayerShape(1, keys.shape[-1], values.shape[-1]).token_bytes(keys.dtype)
    layer.evicted.restore(state)
    layer.later.newest.restore(state, int(state.get("newest_before", 0)))
    layer.plan = Plan.restore(layer.config.policy.rungs, state)
    layer.store = load_store(state, page_size=cache.page_size, precision=cache.precision)
