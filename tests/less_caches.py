"""Caches that remember what they evict: how tests make them, feed them and read their states."""

from __future__ import annotations

import torch

import headwise
import tiny
from less_oracle import kernels_of, networks_of
from passes import play

TOKENIZER = tiny.tokenizer()

SMALL, SCORED = headwise.StreamingLLM(window=5, sinks=4), headwise.H2O(heavy=4, recent=5)


def remembering(model, policy, networks=None, **options):
    """A cache with LESS, and its networks."""
    networks = networks_of(model) if networks is None else networks
    policy = headwise.Less(policy, kernels_of(model, networks))
    return headwise.HeadwiseCache(model, policy, **{"tokenizer": TOKENIZER, "evict_every": 1, **options})


def batch():
    ids, mask = tiny.left_padded(tiny.prompt(23, seed=1)[0], tiny.prompt(37, seed=2)[0], tiny.prompt(5, seed=3)[0])
    # The embedding of the padding token is 0, and so would be what is folded in for it.
    return ids.masked_fill(mask == 0, 50), mask


@torch.no_grad()
def logits(model, ids, cache, **options):
    return model(ids, past_key_values=cache, **options).logits


def states(cache):
    return [layer.core.evicted.state() for layer in cache.headwise_layers]


def same_states(mine, its, tolerance=0.0):
    for one, other in zip(states(mine), states(its), strict=True):
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(one[name], other[name], atol=tolerance, rtol=tolerance)


def step_by_step(model, cache, ids, mask, count):
    further = tiny.prompt(count, seed=8, batch=len(ids))
    play(model, cache, ids, mask, further, [1] * count)


def two_caches(model, policy=SCORED, **options):
    networks = networks_of(model)
    return [remembering(model, policy, networks, **options) for _ in range(2)]
