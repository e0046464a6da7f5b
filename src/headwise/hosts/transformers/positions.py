"""Positions: what a decoder is told of where its tokens are -> the cache knows how that goes with their numbers."""

from __future__ import annotations

from typing import Any

from headwise.errors import CacheStateError
from headwise.policies.base import Policy
from headwise.policies.match import Match
from headwise.policies.wrapper import wrappers
from headwise.types import Int, Tensor


def tell_positions(cache: Any, position_ids: Int[Tensor, "*axes b q"] | None) -> None:
    """Tell a cache the positions of a pass that is about to begin.

    A single step is not looked at where all before it were as counted: it is one of many, and would only take time.
    """
    told = cache.token_log.told
    if position_ids is None or (position_ids.shape[-1] == 1 and told.shift is None):
        told.tell(None, None)
        return
    if position_ids.ndim == 3 and len(position_ids) == 4:
        # The first axis is for the mask alone.
        position_ids = position_ids[1:]
    told.tell(position_ids, None if planned(cache) else _needing(cache.policy))


def _needing(policy: Policy) -> str | None:
    """What of a policy takes a token to be where its number says, if anything does."""
    chooser = policy.chooser
    if chooser.needs_rotation or chooser.needs_repetition or chooser.gates is not False:
        return type(chooser).__name__
    return next((Match.__name__ for wrapper in wrappers(policy) if isinstance(wrapper, Match)), None)


def planned(cache: Any) -> bool:
    """Whether the prompt was profiled: what comes later is not scored."""
    return all(layer.core.plan is not None for layer in cache.headwise_layers)


def check_counted(cache: Any) -> None:
    """Refuse a cache whose next position is not the number of tokens it has seen.

    Raises:
        CacheStateError: saying so.
    """
    if cache.token_log.told.shift is not None:
        raise CacheStateError(
            "a captured step counts positions by itself, and this prompt was read with other position_ids, as images "
            "on several axes are; generate without a captured step"
        )
