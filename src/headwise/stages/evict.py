"""6/7 evict: the plan, the kept rows and the new ones -> what stays; the rule of 2/7, applied once more."""

from __future__ import annotations

import torch

from headwise.less.state import Memory
from headwise.stages.plan import Plan
from headwise.stages.token_log import Transcript
from headwise.store.rows import Rows
from headwise.store.store import RowStore
from headwise.types import Bool, Float, Int, Tensor, Tokens


def facts(
    transcript: Transcript,
    columns: Int[Tensor, "b h n"],
    valid: Bool[Tensor, "b h n"],
    scores: Float[Tensor, "b h n"] | None,
    seen_columns: int,
    prompt: Int[Tensor, " b"] | None,
    layer: int,
    layers: int,
) -> Tokens:
    """The facts about the tokens in those columns, seen from the newest of `seen_columns`.

    Args:
        valid: False where `columns` and `scores` are undefined.
        prompt: real tokens of the prompt; None at its end, when it is all that was seen.
    """
    columns = columns.long().masked_fill(~valid, 0)
    seen = transcript.real_tokens(len(columns), seen_columns, columns.device)
    position = transcript.positions(columns)
    valid = valid & transcript.real(columns)
    return Tokens(
        position=position,
        age=seen[:, None, None] - 1 - position,
        valid=valid,
        pool=valid,
        prompt=(seen if prompt is None else prompt)[:, None, None],
        seen=seen[:, None, None],
        kind=transcript.kinds(columns),
        score=None if scores is None else scores.masked_fill(~valid, 0),
        layer=layer,
        layers=layers,
    )


def evict(
    plan: Plan,
    store: RowStore,
    fresh: Rows | None,
    transcript: Transcript,
    seen: int,
    layer: int,
    layers: int,
    spare: int,
    memory: Memory,
) -> None:
    """Let every head's rule decide over what it holds and the fresh rows, and keep only what it names.

    Args:
        fresh: rows attended to but not yet stored, if any; those not named in its `keep` (padding) are left out.
        seen: columns seen so far, the fresh ones included.
        spare: rows that are going to be appended before the next eviction.
        memory: what the rows that go are folded into.
    """
    valid, columns, scores = store.occupied(), store.kept_columns(), store.kept_scores()
    held = store.longest
    if fresh is not None:
        valid = torch.cat([valid, fresh.keep], dim=-1)
        columns = torch.cat([columns, fresh.columns], dim=-1)
        scores = None if scores is None or fresh.scores is None else torch.cat([scores, fresh.scores], dim=-1)
    keep = plan.keep(facts(transcript, columns, valid, scores, seen, plan.prompt, layer, layers))
    if memory.remembers:
        gone = store.gather(valid[..., :held] & ~keep[..., :held])
        memory.fold(gone.keys, gone.values, gone.keep)
        if fresh is not None:
            memory.fold(fresh.keys, fresh.values, fresh.keep & ~keep[..., held:])
    if fresh is None:
        store.drop(keep, spare)
    else:
        fresh.keep = keep[..., held:]
        store.commit(keep[..., :held], fresh, spare)
