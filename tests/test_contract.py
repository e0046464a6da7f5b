"""The contract of transformers, call by call: what a cache must do besides `generate`, and what must be refused."""

from __future__ import annotations

import gc
import inspect
import json
import weakref

import pytest
import torch
from transformers import DynamicCache

import models
import tiny
from headwise import (
    CacheStateError,
    FastGen,
    Full,
    HeadwiseCache,
    InputError,
    MismatchError,
    StreamingLLM,
    UnsupportedModelError,
)
from headwise.hosts.transformers.kinds import KindTable
from headwise.policies.base import Rule
from models import MIXED

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


# Reset, batches, beams, devices.


@pytest.mark.parametrize("policy", [Full(), FAST, SMALL], ids=["full", "fastgen", "streamingllm"])
def test_after_reset_a_cache_serves_another_batch(model, policy):
    markers = ["w31 w47"]
    cache = new_cache(model, policy, markers=markers)
    logits(model, models.prompt(17).expand(2, -1), cache)
    logits(model, models.prompt(1).expand(2, -1), cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    fresh = new_cache(model, policy, markers=markers)
    assert cache.report().used_bytes == fresh.report().used_bytes
    assert cache.report().allocated_bytes == fresh.report().allocated_bytes
    assert cache.is_croppable
    ids = torch.cat([models.prompt(23, seed=seed) for seed in range(3)])
    for columns_given in (ids, ids[:, :1]):
        close(logits(model, columns_given, cache), logits(model, columns_given, fresh))
    mine, its = cache.report(), fresh.report()
    for kept, other in zip(mine.kept_tokens, its.kept_tokens, strict=True):
        assert (kept is None and other is None) or torch.equal(kept, other)


SELECTIONS = {
    "repeat": (lambda cache: cache.batch_repeat_interleave(3), [0, 0, 0, 1, 1, 1]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    "select-mask": (lambda cache: cache.batch_select_indices(torch.tensor([False, True])), [1]),
    "select-again": (lambda cache: cache.batch_select_indices(torch.tensor([1, 0, 1])), [1, 0, 1]),
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
    "reorder-twice-one": (lambda cache: cache.reorder_cache(torch.tensor([0, 0])), [0, 0]),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_sequences_can_be_repeated_selected_and_reordered(model, name):
    change, indices = SELECTIONS[name]
    ids, mask = tiny.left_padded(models.prompt(11, seed=1)[0], models.prompt(18, seed=2)[0])
    following = torch.tensor([[31, 47], [12, 4]])
    positions = torch.tensor([[11, 12], [18, 19]])
    caches = [new_cache(model, markers=["w31 w47"]), new_cache(model, markers=["w31 w47"])]
    for cache in caches:
        change_positions = mask.cumsum(dim=1).sub(1).clamp(min=0)
        logits(model, ids, cache, attention_mask=mask, position_ids=change_positions)
    changed, same = caches
    change(changed)
    for step in range(2):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        now, at = following[:, step : step + 1], positions[:, step : step + 1]
        expected = logits(model, now, same, attention_mask=mask, position_ids=at)
        found = logits(model, now[indices], changed, attention_mask=mask[indices], position_ids=at[indices])
        close(found, expected[indices])
    for kept, other in zip(changed.report().kept_tokens, same.report().kept_tokens, strict=True):
        assert (kept is None and other is None) or torch.equal(kept, other[indices])


def test_a_fresh_cache_can_be_repeated_selected_and_reordered():
    model = models.shared("gemma3")
    cache = new_cache(model)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0]))
    cache.reorder_cache(torch.tensor([0]))
    ids = models.prompt(9)
    close(logits(model, ids, cache), logits(model, ids))


def test_sequences_cannot_be_selected_while_the_prompt_is_coming_in():
    model = models.shared("llama")
    cache = new_cache(model, SMALL, prompt_tokens=10)
    logits(model, models.prompt(7).expand(2, -1), cache)
    with pytest.raises(CacheStateError, match="still coming in"):
        cache.reorder_cache(torch.tensor([1, 0]))


def test_offload_and_prefetch_move_the_rows():
    model = models.shared("llama")
    cache, other = new_cache(model), new_cache(model)
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    for each in (cache, other):
        logits(model, models.prompt(17), each)
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    close(logits(model, models.prompt(1), cache), logits(model, models.prompt(1), other))
    layer = cache.headwise_layers[0]
    layer.device = torch.device("meta")
    layer.prefetch()
    assert {tensor.device.type for tensor in layer.core.store.tensors()} == {"meta"}


# The model and its caches.


@pytest.mark.parametrize("before", ["eager", "sdpa"])
def test_the_model_is_as_before_when_its_last_cache_dies(before):
    model = models.build("llama")
    model.set_attn_implementation(before)
    first, second = new_cache(model), new_cache(model, Full())
    assert model.config._attn_implementation == "headwise"
    assert model._forward_pre_hooks
    logits(model, models.prompt(9), first)
    del first
    assert model.config._attn_implementation == "headwise"
    logits(model, models.prompt(9), second)
    del second
    assert model.config._attn_implementation == before
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


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
    assert model.config._attn_implementation == "headwise"
    real = mask.bool()
    close(logits(model, ids, attention_mask=mask, use_cache=False)[real], expected[0][real])
    stock = DynamicCache(config=model.config)
    for given, logits_before in zip((ids, ids[:, :3], ids[:, 3:4]), expected[1], strict=True):
        close(logits(model, given, stock), logits_before)
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


def decoder_layers(model):
    decoder = model.get_decoder()
    return decoder.h if hasattr(decoder, "h") else decoder.layers


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


def test_another_attention_under_a_live_cache_is_refused(family):
    model = models.build(family)
    cache = new_cache(model, Full())
    ids = models.prompt(9)
    logits(model, ids, cache)
    model.set_attn_implementation("eager")
    with pytest.raises(CacheStateError, match="set_attn_implementation\\('headwise'\\)"):
        logits(model, ids[:, :1], cache)
    model.set_attn_implementation("headwise")
    close(logits(model, ids[:, :1], cache), logits(model, torch.cat([ids, ids[:, :1]], dim=1))[:, -1:])


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


# Ways to call the model.


def test_embeddings_instead_of_ids(model):
    ids = models.prompt(12)
    embedded = model.get_input_embeddings()(ids)
    with pytest.raises(InputError, match="pass input_ids, not inputs_embeds"):
        logits(model, None, new_cache(model), inputs_embeds=embedded)
    cache, other = new_cache(model, SMALL), new_cache(model, SMALL)
    close(logits(model, None, cache, inputs_embeds=embedded), logits(model, ids, other))
    assert columns(cache) == columns(other) == [0, 1, 7, 8, 9, 10, 11]


@pytest.mark.parametrize("policy", [FAST, SMALL], ids=["fastgen", "streamingllm"])
def test_the_decoder_alone_can_be_called(model, policy):
    ids = models.prompt(15)
    cache, other = new_cache(model, policy), new_cache(model, policy)
    for given in (ids, ids[:, :1]):
        with torch.no_grad():
            hidden = model.get_decoder()(given, past_key_values=cache).last_hidden_state
            found = model.get_output_embeddings()(hidden)
        close(found, logits(model, given, other))
    assert columns(cache) == columns(other)


@pytest.mark.parametrize("policy", [FAST, SMALL], ids=["fastgen", "streamingllm"])
def test_arguments_may_be_positional(model, policy):
    ids = models.prompt(15)
    cache, other = new_cache(model, policy), new_cache(model, policy)
    names = list(inspect.signature(model.forward).parameters)
    values = {"input_ids": ids, "past_key_values": cache}
    given = [values.get(name) for name in names[: names.index("past_key_values") + 1]]
    with torch.no_grad():
        found = model(*given).logits
    close(found, logits(model, ids, other))
    assert columns(cache) == columns(other)


# Masks.


@pytest.mark.parametrize("hidden", [float("-inf"), torch.finfo(torch.float32).min])
def test_a_mask_that_adds_equals_one_of_true_and_false(hidden):
    model = models.shared("llama")
    ids, mask = models.padded_pair()
    positions = mask.cumsum(dim=1).sub(1).clamp(min=0)
    expected_cache, cache = new_cache(model), new_cache(model)
    expected = logits(model, ids, expected_cache, attention_mask=mask, position_ids=positions)
    seen = torch.ones(40, 40, dtype=torch.bool).tril()[None, None] & mask.bool()[:, None, None]
    added = torch.zeros(2, 1, 40, 40).masked_fill(~seen, hidden)
    found = logits(model, ids, cache, attention_mask=added, position_ids=positions)
    close(found[mask.bool()], expected[mask.bool()])
    for mine, its in zip(cache.report().kept_tokens, expected_cache.report().kept_tokens, strict=True):
        assert torch.equal(mine, its)
    assert cache.report().kept_tokens[0][0].max() <= 27


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.full((1, 1, 9, 9), -1.5).triu(1), "bias"),
        (torch.zeros(1, 4, 9, 9), "by head"),
    ],
    ids=["bias", "heads"],
)
def test_a_mask_that_cannot_be_served_is_refused(mask, message):
    model = models.shared("llama")
    with pytest.raises(UnsupportedModelError, match=message):
        logits(model, models.prompt(9), new_cache(model), attention_mask=mask)


def test_right_padding_never_enters_the_store(model):
    long, short = models.prompt(10, seed=1), models.prompt(7, seed=2)
    ids = torch.cat([long, torch.cat([short, torch.full((1, 3), 2)], dim=1)])
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    # Row 1 continues at position 7, in column 10.
    following, positions = torch.tensor([[12], [31]]), torch.tensor([[10], [7]])
    for policy in (Full(), SMALL):
        cache, alone = new_cache(model, policy), new_cache(model, policy)
        found = logits(model, ids, cache, attention_mask=mask)
        close(found[1:, :7], logits(model, short, alone))
        assert columns(cache, row=1) == columns(alone)
        if model.config.model_type == "gemma3_text":
            continue  # A window of transformers' own counts the padding in.
        mask_now = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], dim=1)
        found = logits(model, following, cache, attention_mask=mask_now, position_ids=positions)
        close(found[1:], logits(model, following[1:], alone))
        assert cache.report().kept_tokens[-1][1].tolist() == alone.report().kept_tokens[-1][0].tolist()


def test_dropout_is_refused():
    model = models.build("llama")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    cache = new_cache(model, Full())
    model.train()
    with pytest.raises(UnsupportedModelError, match=r"model\.eval\(\)"):
        logits(model, models.prompt(9), cache)
    model.eval()
    cache.reset()
    logits(model, models.prompt(9), cache)


# Markers.

MARKED = FastGen(recovery=0.0, local=4, ladder=("special+local", "full"))


def test_a_marker_is_special_in_the_prompt(model):
    ids = torch.tensor([[0, 31, 47, 12, 13, 31, 47, 53, 14, 15, 16, 17, 18, 19, 20]])
    cache = new_cache(model, MARKED, markers=["w31 w47 w53"])
    logits(model, ids, cache)
    assert columns(cache) == [0, 5, 6, 7, 11, 12, 13, 14]


def test_a_marker_may_be_generated_over_several_passes(model):
    cache = new_cache(model, MARKED, markers=["w31 w47 w53"])
    logits(model, torch.tensor([[0, 12, 13, 14, 15, 31]]), cache)
    for token in (47, 53, 16, 17, 18, 19, 20, 31, 47, 21, 22, 23, 24):
        logits(model, torch.tensor([[token]]), cache)
    # 31 47 without 53 is no marker.
    assert columns(cache) == [0, 5, 6, 7, 15, 16, 17, 18]


def test_a_marker_that_was_taken_back_leaves_no_mark(model):
    cache = new_cache(model, MARKED, markers=["w31 w47 w53"])
    cache.activate_past_recording()
    logits(model, torch.tensor([[0, 12, 13, 14, 15, 31]]), cache)
    cache.crop(0)
    logits(model, torch.tensor([[47, 53, 16]]), cache)
    cache.crop(-2)
    for token in (17, 18, 19, 20):
        logits(model, torch.tensor([[token]]), cache)
        cache.crop(0)
    assert columns(cache) == [0, 7, 8, 9, 10]


# Memory.


def test_a_dropped_cache_is_freed_at_once(model):
    def used():
        cache = new_cache(model, markers=["w31 w47"])
        ids = models.prompt(30)
        models.generate(model, ids, cache, max_new_tokens=5)
        models.generate(model, torch.cat([ids, ids], dim=1), cache, max_new_tokens=5, prompt_lookup_num_tokens=3)
        return cache

    gc.collect()
    gc.disable()
    try:
        cache = used()
        alive = [weakref.ref(tensor) for tensor in cache.tensors()]
        alive.append(weakref.ref(cache))
        assert len(alive) > 10
        del cache
        assert [each() for each in alive if each() is not None] == []
    finally:
        gc.enable()


def storage_bytes(tensors):
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def test_a_layer_is_compacted_before_the_next_one_runs():
    model = models.build("llama")
    cache = new_cache(model, SMALL)
    held = []
    for layer in decoder_layers(model):
        layer.register_forward_pre_hook(lambda *_: held.append(storage_bytes(reachable(cache))))
    logits(model, models.prompt(331), cache)
    held.append(storage_bytes(reachable(cache)))
    full_layer = 331 * 2 * 2 * 16 * 4
    compact = held[-1]
    assert compact < full_layer / 3
    assert max(held) < compact + 1.5 * full_layer
    # In fact nothing of any prompt is left at the end of its layer.
    assert held[:3] == sorted(held[:3])
    assert max(held) == compact


# Reports.


def reachable(root):
    """Every tensor that can be reached from an object, but for models, policies, tokenizers and their tables."""
    found, todo, met = [], [root], set()
    while todo:
        thing = todo.pop()
        if id(thing) in met or isinstance(thing, weakref.ref | torch.nn.Module | type | Rule):
            continue
        met.add(id(thing))
        if isinstance(thing, torch.Tensor):
            found.append(thing)
        elif isinstance(thing, dict):
            todo += thing.values()
        elif isinstance(thing, list | tuple | set):
            todo += thing
        elif isinstance(thing, KindTable):
            # Kinds of the vocabulary and ids of the markers are the tokenizer's, and shared.
            todo.append(thing.ids)
        elif thing is not TOKENIZER and hasattr(thing, "__dict__"):
            todo.append(vars(thing))
    return found


STAGES = ["fresh", "chunk", "prompt", "decode", "draft", "settled", "beams"]


@pytest.mark.parametrize("policy", [Full(), FAST, SMALL], ids=["full", "fastgen", "streamingllm"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt-oss"], indirect=True)
def test_the_bytes_reported_are_those_of_the_tensors(family, model, policy):
    cache = new_cache(model, policy, prompt_tokens=61, markers=["w31 w47"], page_size=5)
    stock = DynamicCache(config=model.config)
    ids, mask = tiny.left_padded(models.prompt(48, seed=1)[0], models.prompt(61, seed=2)[0])
    position = 0

    def forward(count):
        nonlocal position, mask
        given = ids[:, position : position + count] if position + count <= 61 else ids[:, :count]
        position += count
        if position > 61:
            mask = torch.cat([mask, torch.ones(2, count, dtype=mask.dtype)], dim=1)
        for each in (cache, stock):
            logits(model, given, each, attention_mask=mask[:, :position])

    for stage in STAGES:
        if stage == "chunk":
            forward(29)
        elif stage == "prompt":
            forward(32)
        elif stage == "decode":
            forward(1)
            forward(1)
        elif stage == "draft":
            cache.activate_past_recording()
            stock.activate_past_recording()
            forward(4)
        elif stage == "settled":
            cache.crop(-1)
            stock.crop(-1)
            position -= 1
            mask = mask[:, :position]
        elif stage == "beams":
            for each in (cache, stock):
                each.reorder_cache(torch.tensor([1, 1]))
        report = cache.report()
        # A draft that may be taken back also knows the model's own sink logits.
        held = [tensor for tensor in reachable(cache) if not tensor.requires_grad]
        assert report.allocated_bytes == storage_bytes(held), stage
        assert report.seen_tokens == position
        if stage in ("prompt", "decode", "settled", "beams"):
            check_sizes(report, cache, stock, policy)
        plain = report.to_dict()
        assert json.loads(json.dumps(plain)) == plain
        assert str(report)


def check_sizes(report, cache, stock, policy):
    for layer, its in zip(report.layers, stock.layers, strict=True):
        both = [its.keys, its.values]
        if layer.kept_tokens is None:
            held = [tensor for tensor in vars(its).values() if isinstance(tensor, torch.Tensor)]
            assert layer.rules is None
            assert layer.allocated_bytes == layer.full_bytes == storage_bytes(held)
            continue
        assert layer.full_bytes == sum(tensor.nbytes for tensor in both)
        assert layer.kept_tokens.shape == layer.rules.shape == (2, its.keys.shape[1])
        scored = any("frequent" in rule for rule in layer.rules.flatten())
        row = 4 * (its.keys.shape[-1] + its.values.shape[-1]) + 4 + 4 * scored
        assert layer.used_bytes == int(layer.kept_tokens.sum()) * row
        assert layer.used_bytes <= layer.allocated_bytes
    if policy == SMALL:
        assert all(kept is None or kept.unique().tolist() == [7] for kept in report.kept_tokens)
        assert report.kept_ratio == 7 / report.seen_tokens
    assert report.saved_bytes == report.full_bytes - report.allocated_bytes
