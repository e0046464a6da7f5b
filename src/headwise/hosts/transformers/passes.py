"""Passes: a cache before a forward pass -> nothing, or an error where the last one was broken off, or a doubt."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import DynamicLayer
from transformers.cache_utils import CacheLayerMixin

from headwise.errors import CacheStateError
from headwise.hosts.transformers.layer import HeadwiseLayer
from headwise.stages.layer import LayerCache
from headwise.types import Int, Tensor


def check_pass(layers: Sequence[CacheLayerMixin]) -> None:
    """Refuse a pass over layers that have not seen the same.

    Raises:
        CacheStateError: when the last pass was broken off.
    """
    mine = [layer for layer in layers if isinstance(layer, HeadwiseLayer)]
    # Layers of other kinds count no columns.
    stock = [layer for layer in layers if isinstance(layer, DynamicLayer) and layer.is_initialized]
    lengths = {layer.get_seq_length() for layer in [*mine, *stock]}
    if len(lengths) > 1 or any(layer.awaits_attention or layer.core.readers_left for layer in mine):
        raise CacheStateError("the last forward pass was broken off half-way: reset() the cache and start again")


def chunk_doubt(core: LayerCache, input_ids: Int[Tensor, "b q"] | None) -> str | None:
    """What is doubtful about the second pass, where it looks like more of a prompt that was taken to be complete."""
    taken_for_whole = core.plan is not None and core.config.cache.prompt_columns is None and not core.recording
    if not taken_for_whole or input_ids is None or input_ids.shape[1] == 1:
        return None
    return (
        f"the first {core.seen} tokens were profiled as the whole prompt and more of it seems to follow; with "
        "chunked prefill make the cache with prompt_tokens=input_ids.shape[1]"
    )
