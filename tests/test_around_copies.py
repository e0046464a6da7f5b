"""Caches and models that are copied, pickled or sent to other processes: they go on the same, or say what to do."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle

import pytest
import torch

import headwise
import models
import tiny
from headwise.errors import CacheStateError

IDS = tiny.prompt(30)
GREEDY = {"max_new_tokens": 5, "do_sample": False}
EVICTS = headwise.H2O(heavy=4, recent=5)


def generate(model, cache, ids=IDS):
    return model.generate(ids, past_key_values=cache, attention_mask=torch.ones_like(ids), **GREEDY)


def filled(family="llama", policy=EVICTS):
    model = models.build(family)
    cache = headwise.HeadwiseCache(model, policy)
    generate(model, cache)
    return model, cache


def send(cache):
    multiprocessing.get_context("spawn").Process(target=print, args=(cache,)).start()


WAYS = {
    "pickle": pickle.dumps,
    "torch.save": lambda cache: torch.save(cache, io.BytesIO()),
    "beside other things": lambda cache: pickle.dumps({"ids": IDS, "cache": cache}),
    "copy.copy": copy.copy,
    "spawn": send,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_cache_is_not_pickled_and_says_what_to_do(family, way):
    model, cache = filled(family)
    expected = generate(model, copy.deepcopy(cache), torch.cat([IDS, IDS], dim=1))
    with pytest.raises(CacheStateError, match=r"cannot be pickled: .*cache\.save\(path\).*HeadwiseCache\.load\(path"):
        WAYS[way](cache)
    # And is as it was.
    assert torch.equal(generate(model, cache, torch.cat([IDS, IDS], dim=1)), expected)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("policy", [headwise.Full(), EVICTS, headwise.SnapKV(keep=0.4)], ids=str)
def test_a_copy_goes_on_alone(policy, nested):
    model, cache = filled(policy=policy)
    ids = torch.cat([IDS, IDS], dim=1)
    other = copy.deepcopy({"cache": cache, "ids": IDS})["cache"] if nested else copy.deepcopy(cache)
    ours = {tensor.untyped_storage().data_ptr() for tensor in cache.tensors()}
    assert not ours & {tensor.untyped_storage().data_ptr() for tensor in other.tensors()}
    expected = generate(model, cache, ids)
    assert torch.equal(generate(model, other, ids), expected)
    # A copy outlives what it was made of.
    third = copy.deepcopy(other)
    del cache, other
    assert third.get_seq_length() == 64
    assert generate(model, third, torch.cat([expected, IDS[:, :2]], dim=1)).shape == (1, 72)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_a_model_is_copied_and_saved_while_a_cache_lives(way):
    """And while a user's hook hangs on it; it knows nothing of the cache, and the cache goes on."""
    model, cache = filled()
    plain = model(IDS).logits
    file = io.BytesIO()
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, file)
        other = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert torch.equal(other(IDS).logits, plain)
    assert other.config._attn_implementation == model.config._attn_implementation
    again = headwise.HeadwiseCache(other, EVICTS)
    ids = torch.cat([generate(other, again), IDS], dim=1)
    assert torch.equal(generate(other, again, ids), generate(model, cache, ids))
    assert torch.equal(model(IDS).logits, plain)


def test_what_may_be_sent_is_sent():
    _, cache = filled()
    policy, report = pickle.loads(pickle.dumps((cache.policy, cache.report())))
    assert policy == cache.policy
    assert report.to_dict() == cache.report().to_dict()
