"""Layers that read the keys of another: what is kept is chosen by all that read it, and each reads only that."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import headwise
import models
import tiny
from headwise.errors import CacheStateError, UnsupportedModelError

OWNER, READER = 1, 3
FURTHER = {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": models.VOCABULARY}
FAMILIES = {"gemma4_text": FURTHER, "gemma3n_text": FURTHER | {"laurel_rank": 8, "altup_num_inputs": 2}}


@functools.cache
def model_of(family):
    torch.manual_seed(0)
    layers = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4}
    options = {"head_dim": 16, "sliding_window": 16, "num_kv_shared_layers": 2, "bos_token_id": 0, "pad_token_id": 2}
    config = AutoConfig.for_model(family, **models.SMALL | layers | options | FAMILIES[family])
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("mode", models.MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_with_nothing_evicted_the_ids_are_those_of_the_stock_cache(family, mode):
    model = model_of(family)
    options = {"prompt_tokens": models.PROMPT} if mode == "chunked" else {}
    cache = headwise.HeadwiseCache(model, headwise.Full(), **options)
    assert [layer.core.index for layer in cache.headwise_layers] == [OWNER]
    assert torch.equal(models.MODES[mode](model, cache), models.MODES[mode](model, None))


@pytest.fixture
def watched(monkeypatch):
    """What queries and keys the layers of a model meet, by stock's attention."""
    seen = {}

    def attend(module, query, key, value, attention_mask, **options):
        seen.setdefault(module.layer_idx, []).append((query, key, options["scaling"]))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    AttentionInterface.register("watched", attend)
    AttentionMaskInterface.register("watched", sdpa_mask)
    return seen


def columns_mass(query, key, scaling):
    """What each column of each KV head gets, from all rows of all its query heads; causal."""
    batch, heads, queries, _ = query.shape
    grouped = query.view(batch, key.shape[1], heads // key.shape[1], queries, -1)
    logits = torch.einsum("bhgqd,bhtd->bhgqt", grouped, key) * scaling
    hidden = torch.ones(queries, key.shape[2], dtype=torch.bool).triu(key.shape[2] - queries + 1)
    return logits.masked_fill(hidden, -torch.inf).softmax(-1).sum(dim=(2, 3))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_kept_is_what_all_readers_look_at(family, watched):
    """The heaviest columns by the mass that both layers give them, the reader asked for its last token alone or not."""
    model, ids = model_of(family), models.prompt(40)
    before = model.config._attn_implementation
    model.set_attn_implementation("watched")
    try:
        with torch.no_grad():
            model(ids, past_key_values=DynamicCache(config=model.config))
    finally:
        model.set_attn_implementation(before)
    (own,), (other,) = watched[OWNER], watched[READER]
    assert other[1] is own[1]
    recent, heavy = 5, 6
    both = columns_mass(*own) + columns_mass(*other)
    expected = both[:, :, : 40 - recent].topk(heavy).indices.sort().values
    alone = columns_mass(*own)[:, :, : 40 - recent].topk(heavy).indices.sort().values
    assert not torch.equal(expected, alone), "the reader makes no difference to this prompt"
    for options in ({}, {"logits_to_keep": 1}):
        cache = headwise.HeadwiseCache(model, headwise.H2O(heavy=heavy, recent=recent))
        with torch.no_grad():
            model(ids, past_key_values=cache, **options)
        store = cache.headwise_layers[0].core.store
        kept = store.kept_columns().sort().values
        assert torch.equal(kept[:, :, :heavy], expected.to(kept.dtype))
        assert torch.equal(kept[:, :, heavy:], torch.arange(35, 40, dtype=kept.dtype).expand(1, 2, -1))


@pytest.mark.parametrize("family", FAMILIES)
def test_later_tokens_score_by_all_readers_too(family, watched):
    """Nothing is dropped yet: each column's score is the mass of prompt and tokens, from both layers."""
    model, ids = model_of(family), models.prompt(40)
    passes = ids[:, :36], ids[:, 36:39], ids[:, 39:]
    before = model.config._attn_implementation
    model.set_attn_implementation("watched")
    stock = DynamicCache(config=model.config)
    try:
        with torch.no_grad():
            for part in passes:
                model(part, past_key_values=stock)
    finally:
        model.set_attn_implementation(before)
    expected = torch.zeros(1, 2, 40)
    for layer in (OWNER, READER):
        for query, key, scaling in watched[layer]:
            expected[:, :, : key.shape[2]] += columns_mass(query, key, scaling)
    cache = headwise.HeadwiseCache(model, headwise.H2O(heavy=60, recent=20), prompt_tokens=36)
    with torch.no_grad():
        for part in passes:
            model(part, past_key_values=cache)
    store = cache.headwise_layers[0].core.store
    order = store.kept_columns().long().argsort(dim=-1)
    torch.testing.assert_close(store.kept_scores().gather(2, order), expected, atol=1e-4, rtol=1e-4)


SINKS, WINDOW = 2, 9


@pytest.mark.parametrize("family", FAMILIES)
def test_what_eviction_gives_equals_stock_with_a_mask(family):
    model = model_of(family)

    def attend(module, query, key, value, attention_mask, **options):
        columns = key.shape[2]
        if module.layer_idx in (OWNER, READER) and columns > models.PROMPT:
            column = torch.arange(columns)
            attention_mask = ((column < SINKS) | (column >= columns - WINDOW - 1))[None, None, None]
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    AttentionInterface.register("windowed", attend)
    AttentionMaskInterface.register("windowed", sdpa_mask)
    before, options = model.config._attn_implementation, {"output_logits": True, "return_dict_in_generate": True}
    model.set_attn_implementation("windowed")
    try:
        expected = models.generate(model, models.prompt(), **options)
    finally:
        model.set_attn_implementation(before)
    policy = headwise.StreamingLLM(window=WINDOW, sinks=SINKS)
    found = models.generate(model, models.prompt(), headwise.HeadwiseCache(model, policy, evict_every=1), **options)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "policy",
    [
        headwise.FastGen(recovery=0.3),
        headwise.SnapKV(keep=0.3, window=4),
        headwise.AdaKV(keep=0.3, over="snapkv"),
        headwise.ExpectedAttention(keep=0.3),
        headwise.Quantized(headwise.H2O(heavy=6, recent=8), 8),
        headwise.KVzip(keep=0.3),
    ],
    ids=str,
)
def test_every_kind_of_policy_goes_on_over_several_turns(policy):
    model = model_of("gemma4_text")
    cache = headwise.HeadwiseCache(model, policy, tokenizer=tiny.tokenizer())
    ids = models.MODES["two-turns"](model, cache)
    assert ids.shape[1] == models.PROMPT + 2 * models.NEW + models.TURN
    assert cache.report().kept_ratio < 0.9


def test_what_cannot_be_is_refused():
    model, cache = model_of("gemma4_text"), headwise.HeadwiseCache(model_of("gemma4_text"), headwise.Full())
    with pytest.raises(UnsupportedModelError, match="2 layers read the keys of layer 1"):
        headwise.HeadwiseCache(model, headwise.Less(headwise.H2O(heavy=4, recent=4)))
    models.generate(model, models.prompt(), cache, max_new_tokens=2)
    with pytest.raises(UnsupportedModelError, match="every layer's cache is headwise's alone"):
        headwise.DecodeGraph(model, cache, capture=lambda step: step)


def test_a_pass_that_ends_before_all_have_read_is_noticed():
    model = model_of("gemma4_text")
    cache = headwise.HeadwiseCache(model, headwise.H2O(heavy=4, recent=4))

    def fail(*_):
        raise KeyboardInterrupt

    hook = model.get_decoder().layers[READER].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        model(models.prompt(), past_key_values=cache)
    hook.remove()
    with pytest.raises(CacheStateError, match="broken off"):
        model(models.prompt(), past_key_values=cache)
    cache.reset()
    assert torch.equal(
        models.generate(model, models.prompt(), cache),
        models.generate(model, models.prompt(), headwise.HeadwiseCache(model, headwise.H2O(heavy=4, recent=4))),
    )


def test_a_pass_that_leaves_a_reader_out_is_noticed_at_the_next(monkeypatch):
    model = model_of("gemma4_text")
    cache = headwise.HeadwiseCache(model, headwise.H2O(heavy=4, recent=4))
    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(model.get_decoder().layers[READER], "forward", lambda hidden, *_, **__: hidden)
        model(models.prompt(), past_key_values=cache)
    with pytest.raises(CacheStateError, match="broken off"):
        model(models.prompt(1), past_key_values=cache)


def test_values_are_fitted_to_the_queries_of_all_that_read_them():
    """Also where the policy asks none of them anything."""
    model = model_of("gemma3n_text")
    policy = headwise.Match(headwise.Quantized(headwise.Full()))
    cache = headwise.HeadwiseCache(model, policy, prompt_tokens=models.PROMPT)
    with torch.no_grad():
        model(models.prompt(models.PROMPT - 9), past_key_values=cache)
    (layer,) = cache.headwise_layers
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    assert layer.core.prompt.observations.references.query.shape[2] == layer.core.config.readers * group == 2 * group
