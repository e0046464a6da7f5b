"""The contract of transformers: a cache on a tiny model, and what tests of the contract ask about the two."""

from __future__ import annotations

import pytest
import torch

import models
import tiny
from headwise import FastGen, HeadwiseCache, StreamingLLM

TOKENIZER = tiny.tokenizer()
FAST = FastGen(recovery=0.6)
SMALL = StreamingLLM(window=5, sinks=2)


def new_cache(model, policy=FAST, **options):
    # Rules are applied after every token, unless a test says otherwise.
    return HeadwiseCache(model, policy, tokenizer=TOKENIZER, **{"evict_every": 1, **options})


@torch.no_grad()
def logits(model, ids, cache=None, **options):
    return model(ids, past_key_values=cache, **options).logits


def columns(cache, layer=-1, row=0, head=0):
    """Columns that a head keeps."""
    rows = cache.headwise_layers[layer].core.store.rows()
    return sorted(rows.columns[row, head][rows.keep[row, head]].tolist())


def close(mine, its):
    torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-4)


@pytest.fixture(params=["llama", "gemma3", "gpt2"])
def family(request):
    return request.param


@pytest.fixture
def model(family):
    return models.shared(family)


def decoder_layers(model):
    decoder = model.get_decoder()
    return decoder.h if hasattr(decoder, "h") else decoder.layers
