"""Passes: a model, a cache and tokens -> the logits of every pass."""

from __future__ import annotations

import torch


def play(model, cache, ids, mask, continuation, steps):
    """Logits of every pass: the prompt, then the continuation in passes of the given lengths."""
    logits, start = [], 0
    with torch.no_grad():
        logits.append(model(input_ids=ids, attention_mask=mask, past_key_values=cache, **positions(mask)).logits)
        for step in steps:
            mask = torch.cat([mask, torch.ones(len(ids), step, dtype=torch.long)], 1)
            new = continuation[:, start : start + step]
            start += step
            at = {"position_ids": (mask.cumsum(1) - 1)[:, -step:]}
            logits.append(model(input_ids=new, attention_mask=mask, past_key_values=cache, **at).logits)
    return logits


def positions(mask):
    return {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
