"""A model and its caches: whose passes are served, and what a broken pass, another model or another attention leave."""

from __future__ import annotations

import gc

import pytest
import torch
from transformers import DynamicCache

import models
from contract import FAST, SMALL, close, decoder_layers, family, logits, model, new_cache
from headwise import CacheStateError, Full, MismatchError
from models import MIXED

__all__ = ["family", "model"]


# The model and its caches.


@pytest.mark.parametrize("before", ["eager", "sdpa"])
def test_the_model_is_as_before_but_in_a_pass_and_free_when_its_last_cache_dies(before):
    model = models.build("llama")
    model.set_attn_implementation(before)
    first, second = new_cache(model), new_cache(model, Full())
    inside = []
    handle = (
        model.get_decoder().layers[0].register_forward_hook(lambda *_: inside.append(model.config._attn_implementation))
    )
    for cache in (first, second, None):
        assert model.config._attn_implementation == before
        logits(model, models.prompt(9), cache)
    assert inside == ["headwise", "headwise", before]
    handle.remove()
    assert "forward" in vars(model)
    del first, cache
    logits(model, models.prompt(9), second)
    del second
    assert model.config._attn_implementation == before
    for module in model.modules():
        assert "forward" not in vars(module)
    assert "prepare_inputs_for_generation" not in vars(model)


def test_a_choice_made_meanwhile_stays():
    model = models.build("llama")
    cache = new_cache(model)
    model.set_attn_implementation("sdpa")
    del cache
    assert model.config._attn_implementation == "sdpa"


def test_a_model_can_die_before_its_cache():
    model = models.build("llama")
    cache = new_cache(model)
    del model
    gc.collect()
    with pytest.raises(MismatchError, match="is gone"):
        _ = cache.model
    assert cache.get_seq_length() == 0


def test_two_caches_of_one_model_do_not_see_each_other(model):
    prompts = [models.prompt(21, seed=1), models.prompt(14, seed=2)]
    policies = [FAST, SMALL]
    alone = []
    for ids, policy in zip(prompts, policies, strict=True):
        cache = new_cache(model, policy)
        alone.append([logits(model, each, cache) for each in (ids, ids[:, :1], ids[:, 1:2])])
        del cache
    caches = [new_cache(model, policy) for policy in policies]
    for step in range(3):
        for ids, cache, expected in zip(prompts, caches, alone, strict=True):
            given = (ids, ids[:, :1], ids[:, 1:2])[step]
            close(logits(model, given, cache), expected[step])
    assert [cache.get_seq_length() for cache in caches] == [23, 16]


@pytest.mark.parametrize("family", models.FAMILIES, indirect=True)
def test_other_caches_and_none_are_served_as_before(family, model):
    ids, mask = models.padded_pair()
    expected = [logits(model, ids, attention_mask=mask, use_cache=False), []]
    stock = DynamicCache(config=model.config)
    expected[1] = [logits(model, each, stock) for each in (ids, ids[:, :3], ids[:, 3:4])]
    cache = new_cache(model, Full())
    assert torch.equal(logits(model, ids, attention_mask=mask, use_cache=False), expected[0])
    stock = DynamicCache(config=model.config)
    for given, logits_before in zip((ids, ids[:, :3], ids[:, 3:4]), expected[1], strict=True):
        assert torch.equal(logits(model, given, stock), logits_before)
    assert cache.get_seq_length() == 0


def test_a_cache_of_another_model_is_refused(family, model):
    cache, fresh = new_cache(model), new_cache(model)
    other = models.build(family, seed=1)
    with pytest.raises(MismatchError, match=f"made for a {type(model).__name__}"):
        logits(other, models.prompt(9), cache)
    with pytest.raises(MismatchError):
        cache.update(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16), len(cache.layers) - 1)
    # In its own model's hands it is as new, or says that it is not.
    if family in MIXED:
        with pytest.raises(CacheStateError, match="broken off"):
            logits(model, models.prompt(9), cache)
        cache.reset()
    close(logits(model, models.prompt(9), cache), logits(model, models.prompt(9), fresh))


class Broken(Exception):
    pass


def break_in(module):
    def fail(*_):
        raise Broken

    return module.register_forward_hook(fail)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("step", ["prompt", "decode"])
def test_a_pass_that_was_broken_off_is_noticed_and_reset_recovers(model, step, layer):
    cache, fresh = new_cache(model), new_cache(model)
    ids = models.prompt(14)
    if step == "decode":
        logits(model, ids, cache)
    given = ids if step == "prompt" else ids[:, :1]
    handle = break_in(decoder_layers(model)[layer])
    with pytest.raises(Broken):
        logits(model, given, cache)
    handle.remove()
    for _ in range(2):
        with pytest.raises(CacheStateError, match=r"broken off half-way: reset\(\)"):
            logits(model, given, cache)
    cache.reset()
    batch = ids[:, :13].expand(2, -1)
    close(logits(model, batch, cache), logits(model, batch, fresh))
    close(logits(model, batch[:, :1], cache), logits(model, batch[:, :1], fresh))


def test_a_pass_that_failed_before_the_first_layer_leaves_no_trace(model):
    cache, fresh = new_cache(model, markers=["w31 w47 w53"]), new_cache(model, markers=["w31 w47 w53"])
    ids = torch.cat([models.prompt(11), torch.tensor([[31]])], dim=1)
    with pytest.raises(IndexError):
        logits(model, torch.full((2, 3), 10_000), cache)
    logits(model, ids, cache)
    logits(model, ids, fresh)
    with pytest.raises(IndexError):
        logits(model, torch.full((1, 1), 10_000), cache)
    for token in (47, 53, 60):
        close(logits(model, torch.tensor([[token]]), cache), logits(model, torch.tensor([[token]]), fresh))
    assert torch.equal(cache.token_log.tensors()["kinds"], fresh.token_log.tensors()["kinds"])


def test_another_attention_may_be_set_under_a_live_cache(family):
    model = models.build(family)
    cache = new_cache(model, Full())
    ids = models.prompt(9)
    logits(model, ids, cache)
    model.set_attn_implementation("sdpa")
    close(logits(model, ids[:, :1], cache), logits(model, torch.cat([ids, ids[:, :1]], dim=1))[:, -1:])
    assert model.config._attn_implementation == "sdpa"


def test_a_model_that_changes_the_keys_after_the_cache_is_refused(monkeypatch):
    model = models.build("llama")
    cache = new_cache(model, Full())
    layer = cache.headwise_layers[0]
    update = layer.update

    def cloned(*args, **kwargs):
        keys, values = update(*args, **kwargs)
        return keys.clone(), values

    monkeypatch.setattr(layer, "update", cloned)
    with pytest.raises(CacheStateError, match="changed the keys"):
        logits(model, models.prompt(9), cache)
