"""Steering, the long way: attention as transformers' eager one computes it, with an addition to the logits per head."""

from __future__ import annotations

import math
from contextlib import contextmanager

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

_NAME = "steered-oracle"
_now = {}


def _attention(module, query, key, value, mask, scaling=None, softcap=None, s_aux=None, **_):
    heads, group = key.shape[1], query.shape[1] // key.shape[1]
    key, value = (rows.repeat_interleave(group, 1).double() for rows in (key, value))
    logits = query.double() @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if mask is not None:
        logits = logits.masked_fill(mask < -1e9, -torch.inf)
    steered = _now["heads"].get(module.layer_idx, ())
    values = torch.zeros(len(query), key.shape[2], dtype=torch.float64)
    count = min(_now["marks"].shape[1], key.shape[2])
    values[:, :count] = _now["marks"].repeat_interleave(len(query) // len(_now["marks"]), 0)[:, :count]
    for head in steered:
        added = values[:, None]
        if _now["target"] is not None:
            share = (logits[:, head].softmax(-1) * (values[:, None] != 0)).sum(-1, keepdim=True)
            added = added * (_now["target"] / share).log().clamp(min=0).where(share > 0, 0)
        logits[:, head] = logits[:, head] + added
    if s_aux is not None:
        sink = s_aux.double().view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sink], -1)
    weights = logits.softmax(-1).nan_to_num(0)[..., : key.shape[2]]
    assert heads * group == query.shape[1]
    return (weights @ value).to(query.dtype).transpose(1, 2).contiguous(), None


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, eager_mask)


@contextmanager
def steered(model, heads, marks, target=None):
    """While it lasts, the model itself is steered, with any cache of transformers.

    Args:
        heads: query heads by layer.
        marks: `[b, m]`, what is added to the logits of the first columns; or 1 for marked ones, with a target share.
    """
    before = model.config._attn_implementation
    _now.update(heads=heads, marks=marks.double(), target=target)
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def pasta_marks(spans, mask, alpha=0.01, unscaled=0):
    """Logarithm of alpha for tokens of prompts that are not marked, where something is; 0 for padding."""
    marks = torch.zeros(mask.shape, dtype=torch.float64)
    for row, ranges in enumerate(spans):
        for column in range(mask.shape[1]):
            marked = any(start <= column < stop for start, stop in ranges)
            position = int(mask[row, : column + 1].sum()) - 1
            if ranges and mask[row, column] and not marked and position >= unscaled:
                marks[row, column] = math.log(alpha)
    return marks
