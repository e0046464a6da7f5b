"""Caches with a policy that scores the prompt: what comes after it, taking back, saving, copying, and bytes."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

import headwise
import tiny
from headwise.errors import CacheStateError, ConfigurationError, UnsupportedModelError
from models import MIXED, MODES, PROMPT, WatchedCache, build, shared
from scored_prompts import TOKENS, kept, model, policy, read, words

__all__ = ["policy"]

NEW = 6


def step(cache, ids):
    """Logits of a further pass."""
    at = torch.arange(cache.get_seq_length(), cache.get_seq_length() + ids.shape[1])[None]
    with torch.no_grad():
        return model()(input_ids=ids, past_key_values=cache, position_ids=at.expand(len(ids), -1)).logits


def further(count=NEW, seed=9):
    return words(count + 1, seed=seed)[:, 1:]


def test_what_is_generated_stays(policy):
    cache = read(policy, words(TOKENS), evict_every=1)
    before = kept(cache)
    for at, new in enumerate(further().split(1, dim=1), start=TOKENS):
        step(cache, new)
        before = [[[head | {at} for head in heads] for heads in layer] for layer in before]
        assert kept(cache) == before
    step(cache, further(seed=10))
    assert kept(cache) == [
        [[head | set(range(TOKENS + NEW, TOKENS + 2 * NEW)) for head in heads] for heads in layer] for layer in before
    ]


def test_attention_is_over_what_is_kept_and_nothing_else(policy):
    ids = words(TOKENS, seed=2)
    cache, full = read(policy, ids), read(headwise.Full(), ids)
    for layer, whole in zip(cache.headwise_layers, full.headwise_layers, strict=True):
        rows, all_rows = layer.core.store.rows(), whole.core.store.rows()
        at = rows.columns.masked_fill(~rows.keep, 0).long()
        for name in ("keys", "values"):
            stored, given = getattr(rows, name), getattr(all_rows, name)
            expected = given.gather(2, at[..., None].expand(-1, -1, -1, given.shape[-1]))
            assert torch.equal(stored[rows.keep], expected[rows.keep])


@pytest.mark.parametrize("evict_every", [1, 16])
def test_generated_tokens_can_be_taken_back_and_the_prompt_cannot(policy, evict_every):
    """Between two choices, where there is more than one."""
    if evict_every == 1:
        policy = replace(policy, of="prompt")
    ids = words(TOKENS, seed=3)
    cache = read(policy, ids, evict_every=evict_every)
    settled = kept(cache)
    logits = [step(cache, new) for new in further().split(1, dim=1)]
    assert all(layer.is_croppable is (policy.again is None) for layer in cache.headwise_layers)
    cache.crop(-(NEW - 2))
    assert cache.get_seq_length() == TOKENS + 2
    torch.testing.assert_close(step(cache, further()[:, 2:3]), logits[2])
    with pytest.raises(CacheStateError, match="cannot remove 4 tokens"):
        cache.crop(-4)
    cache.crop(-3)
    assert kept(cache) == settled
    with pytest.raises(CacheStateError, match="cannot remove 1 tokens"):
        cache.crop(-1)
    assert kept(cache) == settled


def test_saved_and_copied_caches_go_on_alike(policy, tmp_path):
    ids, mask = tiny.left_padded(words(TOKENS, seed=1)[0], words(TOKENS - 9, seed=2)[0])
    cache = read(policy, ids, mask)
    cache.save(tmp_path / "cache.safetensors")
    loaded = headwise.HeadwiseCache.load(tmp_path / "cache.safetensors", model(), policy, tokenizer=tiny.tokenizer())
    copied = copy.deepcopy(cache)
    assert kept(loaded) == kept(copied) == kept(cache)
    for new in further().split(1, dim=1):
        at = (mask.sum(1, keepdim=True) + cache.get_seq_length() - TOKENS).long()
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
        given = {"input_ids": new.expand(2, 1), "attention_mask": mask, "position_ids": at}
        with torch.no_grad():
            logits = [model()(**given, past_key_values=one).logits for one in (cache, loaded, copied)]
        assert torch.equal(logits[0], logits[1])
        assert torch.equal(logits[0], logits[2])
    for one in (loaded, copied):
        one.crop(-NEW)
        with pytest.raises(CacheStateError, match="cannot remove 1 tokens"):
            one.crop(-1)


def test_a_half_read_prompt_is_neither_saved_nor_cut(policy, tmp_path):
    cache = headwise.HeadwiseCache(model(), policy, tokenizer=tiny.tokenizer(), prompt_tokens=TOKENS)
    step(cache, words(20))
    with pytest.raises(CacheStateError, match="whole prompt"):
        cache.save(tmp_path / "cache.safetensors")
    with pytest.raises(CacheStateError, match="prompt is still coming in"):
        cache.crop(-1)


def test_memory_is_freed(policy):
    ids = tiny.prompt(300, seed=4)
    cache, full = read(policy.with_keep(30), ids), read(headwise.Full(), ids)
    held = sum(len(head) for layer in kept(cache) for heads in layer for head in heads)
    report = cache.report()
    row = 2 * 14 * 4
    assert held * row <= report.used_bytes <= held * (row + 8)
    asked = sum(t.nbytes for layer in cache.headwise_layers for t in layer.core.later.newest.state().values())
    assert report.allocated_bytes - asked < full.report().allocated_bytes / 3
    stored = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in cache.tensors()}
    assert sum(stored.values()) == report.allocated_bytes
    assert all(layer.core.prompt.tensors() == [] for layer in cache.headwise_layers)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("of", ["seen", "prompt"])
@pytest.mark.parametrize("policy", [headwise.SnapKV(9, window=4), headwise.KVzip(9)], ids=str)
def test_generates_in_every_mode(policy, of, mode):
    policy = replace(policy, of=of, choose_every=4)
    cache = WatchedCache(
        shared("llama"), policy, tokenizer=tiny.tokenizer(), prompt_tokens=PROMPT if mode == "chunked" else None
    )
    MODES[mode](shared("llama"), cache)
    kept_tokens = torch.cat([layer.core.kept_tokens for layer in cache.headwise_layers], dim=1)
    later = cache.get_seq_length() - PROMPT
    mean = kept_tokens.double().mean(dim=1)
    if of == "prompt":
        assert (kept_tokens >= later).all()
        assert (mean == later + 9).all()
    else:
        # A pass may bring more than one token.
        assert (mean >= 9).all() and (mean < 9 + 4 + 5).all()


# Repeating the prompt.


@pytest.mark.parametrize("family", ["llama", *MIXED])
def test_repeating_leaves_nothing_behind(family):
    ids = words(29, seed=5)
    logits = []
    for scorer in (headwise.KVzip(1.0), headwise.Full()):
        one = build(family)
        cache = headwise.HeadwiseCache(one, scorer, tokenizer=tiny.tokenizer())
        with torch.no_grad():
            first = one(input_ids=ids, past_key_values=cache).logits
            after = [one(input_ids=new, past_key_values=cache).logits for new in further().split(1, dim=1)]
        logits.append(torch.cat([first, *after], dim=1))
        assert cache.get_seq_length() == 29 + NEW
    assert torch.equal(*logits)


def test_kvzip_asks_for_a_tokenizer_and_for_ids():
    with pytest.raises(ConfigurationError, match="needs a tokenizer"):
        headwise.HeadwiseCache(model(), headwise.KVzip(0.5))
    cache = headwise.HeadwiseCache(model(), headwise.KVzip(0.5), tokenizer=tiny.tokenizer())
    with pytest.raises(headwise.InputError, match="input_ids"), torch.no_grad():
        model()(inputs_embeds=torch.zeros(1, 5, 84), past_key_values=cache)


def test_expected_attention_says_which_models_it_cannot_serve():
    gpt2 = build("gpt2")
    with pytest.raises(UnsupportedModelError, match="how layer 0 of GPT2LMHeadModel makes positions is not known"):
        headwise.HeadwiseCache(gpt2, headwise.ExpectedAttention(0.5))
