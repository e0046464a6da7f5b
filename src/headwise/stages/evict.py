"""6/7 evict: the plan, the kept rows and the new ones -> a smaller store; the rule of 2/7, applied once more."""

from __future__ import annotations

import torch

from headwise.less.state import EvictedState
from headwise.stages.config import LayerConfig
from headwise.stages.plan import Plan
from headwise.stages.token_log import TokenLog
from headwise.store.rows import Rows
from headwise.store.store import RowStore


def evict(
    config: LayerConfig,
    plan: Plan,
    store: RowStore,
    fresh: Rows | None,
    log: TokenLog,
    seen: int,
    spare: int,
    evicted: EvictedState,
) -> None:
    """Let every head's rule decide over what it holds and the fresh rows, and keep only what it names.

    Args:
        fresh: rows attended to but not yet stored, if any; those not named in its `keep` (padding) are left out.
        seen: columns seen so far, the fresh ones included.
        spare: rows that are going to be appended before the next eviction.
        evicted: what the rows that go are folded into.
    """
    valid, columns, scores = store.occupied(), store.kept_columns(), store.kept_scores()
    held = store.longest
    if fresh is not None:
        valid = torch.cat([valid, fresh.keep], dim=-1)
        columns = torch.cat([columns, fresh.columns], dim=-1)
        scores = None if scores is None or fresh.scores is None else torch.cat([scores, fresh.scores], dim=-1)
    keep = plan.keep(log.facts(columns, valid, scores, seen, plan.prompt, config.index, config.cache.layers))
    if evicted.remembers:
        gone = store.gather(valid[..., :held] & ~keep[..., :held])
        evicted.fold(gone.keys, gone.values, gone.keep)
        if fresh is not None:
            evicted.fold(fresh.keys, fresh.values, fresh.keep & ~keep[..., held:])
    if fresh is None:
        store.drop(keep, spare)
    else:
        store.commit(keep[..., :held], fresh.naming(keep[..., held:]), spare)
