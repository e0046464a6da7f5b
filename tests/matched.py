"""Matched caches: a policy -> a cache of a small model with a prompt in it, its rows, and what it answers."""

from __future__ import annotations

import functools

import torch

import headwise
import tiny

SNAP = headwise.SnapKV(keep=20, window=4)
IDS = tiny.prompt(97, seed=3)
PROMPT = 80


@functools.cache
def llama():
    return tiny.llama()


def cache_of(policy, model=None, **options):
    return headwise.HeadwiseCache(model or llama(), policy, **options)


def read(policy, ids=IDS[:, :PROMPT], mask=None, **options):
    """A cache with the prompt in it."""
    cache = cache_of(policy, prompt_tokens=ids.shape[1], **options)
    with torch.no_grad():
        llama()(ids, attention_mask=mask, past_key_values=cache)
    return cache


def answers(cache, ids=IDS[:, PROMPT:]):
    with torch.no_grad():
        return torch.cat([llama()(each, past_key_values=cache).logits for each in ids.split(1, dim=1)], dim=1)


def stores(cache):
    return [layer.core.store.rows() for layer in cache.headwise_layers]
