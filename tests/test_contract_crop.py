"""What a layer says about itself, and taking tokens back: exactly, or with a refusal that changes nothing."""

from __future__ import annotations

import pytest
import torch

import models
from contract import FAST, SMALL, close, columns, family, logits, model, new_cache
from headwise import CacheStateError, Full, InputError

__all__ = ["family", "model"]


# What a layer says about itself.


def test_a_fresh_layer_and_a_used_one_say_what_transformers_asks(model):
    cache = new_cache(model, SMALL)
    for seen in (0, 19):
        if seen:
            logits(model, models.prompt(seen), cache)
        for layer in cache.headwise_layers:
            assert layer.get_seq_length() == seen
            # Logical sizes, whatever was evicted.
            assert layer.get_mask_sizes(5) == (seen + 5, 0)
            assert layer.get_max_length() == -1
            assert not layer.is_sliding
            assert not layer.is_compileable
            assert not layer.supports_early_init
            assert layer.is_initialized == bool(seen)
        assert cache.get_seq_length() == seen
    assert cache.report().kept_tokens[-1].unique().tolist() == [7]


# Crop.


@pytest.mark.parametrize("removed", [1, 4, 10])
def test_crop_with_nothing_evicted_is_exact(model, removed):
    ids, more = models.prompt(10, seed=4), models.prompt(6, seed=5)
    cache = new_cache(model, Full())
    cache.crop(0)
    logits(model, ids, cache)
    assert cache.is_croppable
    cache.crop(0)
    assert cache.get_seq_length() == 10
    # 5.17 calls it with a tensor; layers that shared it would count together.
    cache.crop(torch.tensor(-removed))
    assert cache.get_seq_length() == 10 - removed
    assert cache.report().kept_tokens[-1].unique().tolist() == [10 - removed]
    whole = torch.cat([ids[:, : 10 - removed], more], dim=1)
    close(logits(model, more, cache), logits(model, whole)[:, 10 - removed :])
    assert type(cache.get_seq_length()) is int
    close(logits(model, ids[:, :1], cache), logits(model, torch.cat([whole, ids[:, :1]], dim=1))[:, -1:])


def test_crop_refuses_a_positive_number_and_more_than_there_is(model):
    cache = new_cache(model, Full())
    logits(model, models.prompt(7), cache)
    with pytest.raises(InputError, match="0 or minus the number"):
        cache.crop(3)
    with pytest.raises(CacheStateError, match="cannot remove 8 tokens"):
        cache.crop(-8)
    assert {layer.get_seq_length() for layer in cache.layers} == {7}


def test_crop_is_refused_once_something_was_evicted(model):
    ids = models.prompt(10)
    cache, other = new_cache(model, SMALL), new_cache(model, SMALL)
    assert cache.is_croppable
    for each in (cache, other):
        logits(model, ids, each)
    assert not cache.is_croppable
    with pytest.raises(CacheStateError, match="does not return"):
        cache.crop(-1)
    # Nothing has changed, in the layers that transformers keeps neither.
    assert {layer.get_seq_length() for layer in cache.layers} == {10}
    close(logits(model, ids[:, :1], cache), logits(model, ids[:, :1], other))


def test_crop_removes_from_all_layers_or_from_none():
    model = models.shared("llama")
    cache = new_cache(model, Full())
    logits(model, models.prompt(9), cache)
    cache.headwise_layers[-1].core.plan.evicts = True
    with pytest.raises(CacheStateError):
        cache.crop(-2)
    assert [layer.get_seq_length() for layer in cache.layers] == [9, 9, 9]


def test_crop_is_refused_while_the_prompt_is_coming_in(model):
    cache = new_cache(model, SMALL, prompt_tokens=10)
    logits(model, models.prompt(7), cache)
    assert not cache.is_croppable
    with pytest.raises(CacheStateError, match="still coming in"):
        cache.crop(-2)
    assert cache.get_seq_length() == 7


@pytest.mark.parametrize("policy", [FAST, SMALL], ids=["fastgen", "streamingllm"])
def test_while_recording_the_tokens_of_the_last_pass_can_be_taken_back(model, policy):
    ids, draft = models.prompt(10), models.prompt(5, seed=6)[:, 1:]
    cache, plain = new_cache(model, policy), new_cache(model, policy, prompt_tokens=10)
    logits(model, ids, plain)
    logits(model, draft[:, :2], plain)
    cache.activate_past_recording()
    logits(model, ids, cache)
    cache.crop(0)
    logits(model, draft, cache)
    with pytest.raises(CacheStateError, match="only the 4 of the last pass"):
        cache.crop(-5)
    cache.crop(-2)
    assert cache.get_seq_length() == 12
    for layer in range(len(cache.headwise_layers)):
        assert columns(cache, layer) == columns(plain, layer)
    close(logits(model, ids[:, :3], cache), logits(model, ids[:, :3], plain))
    # The end of recording accepts what was not taken back.
    for layer in cache.layers:
        layer.record_past = False
    assert columns(cache) == columns(plain)
