"""Take back: what a layer holds -> whether its newest tokens can be removed again, or why they cannot."""

from __future__ import annotations

from headwise.errors import CacheStateError
from headwise.stages.decode import Pass
from headwise.stages.plan import Plan
from headwise.store.store import RowStore


def check_last_pass(count: int, last: Pass) -> None:
    """Refuse to take back more tokens than the last pass had, while it can still be judged.

    Raises:
        CacheStateError: when there were fewer.
    """
    there = last.keys.shape[2]
    if count > there:
        raise CacheStateError(f"cannot remove {count} tokens: only the {there} of the last pass can go")


def check_taken_in(
    count: int, seen: int, evicted_at: int, begun: bool, plan: Plan | None, store: RowStore | None
) -> None:
    """Refuse to take back tokens that have had an effect which cannot be undone.

    Args:
        seen: columns.
        evicted_at: how many of them there were when the rules were last applied.
        begun: whether the prompt is still coming in.

    Raises:
        CacheStateError: when the state without those tokens is no longer known.
    """
    if count > seen:
        raise CacheStateError(f"cannot remove {count} tokens from a cache that has seen {seen}")
    if begun:
        raise CacheStateError("cannot remove tokens while the prompt is still coming in")
    beyond = plan is not None and plan.chosen_once and seen - count < evicted_at
    ranked = plan is not None and (plan.evicts or plan.scored)
    if beyond or ranked:
        raise CacheStateError(
            f"cannot remove {count} tokens: rules have evicted or ranked tokens with them in view, and what is "
            "evicted does not return; reset() the cache and start again"
        )
    if store is not None and not store.can_forget(count):
        raise CacheStateError(
            f"cannot remove {count} tokens: older ones were written down as codes because of them, and codes do "
            "not become exact again; reset() the cache and start again"
        )
