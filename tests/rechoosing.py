"""Rechoosing: caches of policies that choose again -> what they hold while turns and single tokens come."""

from __future__ import annotations

import torch

import headwise
import tiny
from oracle import rows_of
from scored_prompts import model

EVERY, PROMPT = 5, 41

# Passes behind the prompt: steps, a turn, drafts.
PASSES = [1] * 16 + [19, 1, 1, 4, 1, 30, 1, 1, 2] + [1] * 20 + [9, 1]


def follow(cache, ids, passes, after=lambda seen: None):
    """Read the prompt and then so many tokens at a time."""
    with torch.no_grad():
        for end in torch.tensor([PROMPT, *passes]).cumsum(0).tolist():
            part = slice(cache.get_seq_length(), end)
            model()(input_ids=ids[:, part], past_key_values=cache, position_ids=torch.arange(end)[None, part])
            after(end)
    return cache


def new(policy, **options):
    return headwise.HeadwiseCache(model(), policy, tokenizer=tiny.tokenizer(), **options)


def held(cache):
    """Columns of every head of every layer, of one sequence."""
    return [rows_of(layer.core)[0] for layer in cache.headwise_layers]
