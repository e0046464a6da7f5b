"""Policies that score the prompt: examples of them, prompts, and what a cache keeps of these."""

from __future__ import annotations

import functools

import pytest
import torch

import headwise
import tiny
from oracle import rows_of

TOKENS, PADS = 47, 9

# Windows that leave something to choose of prompts this short.
SMALL = [
    headwise.SnapKV(0.3, window=8, kernel=3),
    headwise.SnapKV(19, window=5, kernel=1),
    headwise.SnapKV(19, window=16, kernel=7),
    headwise.PyramidKV(0.4, window=3, kernel=3, steepness=4),
    headwise.RKV(0.3, window=4, kernel=3, alike=0.4),
    headwise.RKV(14, window=2, kernel=1, weight=0.5, alike=0.2, spared=3),
    headwise.TOVA(0.3),
    headwise.KeyNorm(0.21),
    headwise.KeyDiff(11),
    headwise.Scissorhands(0.3, history=10, recent=3),
    headwise.ExpectedAttention(0.3, future=20),
    headwise.ExpectedAttention(13, future=7, sinks=2),
    headwise.ExpectedAttention(0.3, epsilon=0.5),
    headwise.AdaKV(0.3, over=headwise.SnapKV(0.3, window=4, kernel=3)),
    headwise.AdaKV(11, over="keydiff", safeguard=0.5),
    headwise.AdaKV(0.3, over="expected-attention", safeguard=0.0),
    headwise.KVzip(0.3),
    headwise.KVzip(11, sinks=1),
    headwise.PeakAttention(keep=0.4, window=5),
    headwise.PeakAttention(0.7, window=3, sinks=2),
]


@functools.cache
def model():
    return tiny.llama(layers=3)


def words(count, *, seed=0):
    """A prompt in which no token comes twice: in the first layer, rotated keys of equal tokens are equally long."""
    generator = torch.Generator().manual_seed(seed)
    return 3 + torch.randperm(tiny.VOCABULARY - 3, generator=generator)[None, :count]


@pytest.fixture(params=SMALL, ids=str)
def policy(request):
    return request.param


def padded(*prompts):
    """A batch whose pads are words: the model's own pad is all zeros, and nobody would notice it."""
    ids, mask = tiny.left_padded(*prompts)
    return ids.masked_fill(mask == 0, 50), mask


def read(policy, ids, mask=None, *, pieces=None, **options):
    """The cache after the prompt, which comes in pieces of that many columns."""
    cache = headwise.HeadwiseCache(
        model(), policy, tokenizer=tiny.tokenizer(), prompt_tokens=ids.shape[1] if pieces else None, **options
    )
    real = torch.ones_like(ids) if mask is None else mask
    at = (real.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        for start in range(0, ids.shape[1], pieces or ids.shape[1]):
            part = slice(start, start + (pieces or ids.shape[1]))
            shown = None if mask is None else mask[:, : part.stop]
            model()(input_ids=ids[:, part], attention_mask=shown, position_ids=at[:, part], past_key_values=cache)
    return cache


def kept(cache):
    """Of every layer, sequence and head."""
    return [rows_of(layer.core) for layer in cache.headwise_layers]
