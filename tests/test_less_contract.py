"""The contract of a cache that remembers: batches, selections, drafts, files, captured steps, refusals, reports."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import headwise
import models
import tiny
from captured_steps import NeverWaits, traced
from headwise.errors import CacheStateError
from headwise.hosts.transformers.graph import DecodeGraph
from less_caches import (
    SCORED,
    SMALL,
    TOKENIZER,
    batch,
    logits,
    remembering,
    same_states,
    states,
    step_by_step,
    two_caches,
)
from less_oracle import draw, kernels_of, networks_of
from passes import play


@pytest.mark.parametrize("policy", [SMALL, SCORED, headwise.SnapKV(keep=9)], ids=lambda policy: policy.name)
def test_a_row_of_a_batch_is_as_it_is_alone(policy):
    model, prompts = tiny.llama(layers=2), [tiny.prompt(23, seed=1), tiny.prompt(37, seed=2), tiny.prompt(5, seed=3)]
    ids, mask = batch()
    together = remembering(model, policy)
    further = tiny.prompt(20, seed=8, batch=3)
    outputs = play(model, together, ids, mask, further, [1] * 20)
    for row, prompt in enumerate(prompts):
        alone = remembering(model, policy)
        expected = play(model, alone, prompt, torch.ones_like(prompt), further[row : row + 1], [1] * 20)
        for mine, its in zip(outputs[1:], expected[1:], strict=True):
            torch.testing.assert_close(mine[row : row + 1], its, atol=1e-4, rtol=1e-4)
        for mine, its in zip(states(together), states(alone), strict=True):
            for name, tensor in its.items():
                torch.testing.assert_close(mine[name][row : row + 1], tensor, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("policy", [SMALL, SCORED], ids=lambda policy: policy.name)
def test_a_second_prompt_after_reset_is_as_in_a_fresh_cache(policy):
    model = tiny.llama(layers=2)
    used, fresh = two_caches(model, policy)
    step_by_step(model, used, *batch(), 9)
    used.reset()
    assert used.report().memory_bytes == 0
    ids = tiny.prompt(31, seed=4)
    mine, its = (play(model, cache, ids, torch.ones_like(ids), ids[:, 1:], [1] * 12) for cache in (used, fresh))
    assert all(torch.equal(one, other) for one, other in zip(mine, its, strict=True))
    same_states(used, fresh)


def test_two_prompts_in_two_caches_do_not_mix():
    model = tiny.llama(layers=2)
    one, other = two_caches(model)
    first, second = tiny.prompt(31, seed=4), tiny.prompt(27, seed=5)
    logits(model, first, one)
    before = copy.deepcopy(states(one))
    logits(model, second, other)
    for held, was in zip(states(one), before, strict=True):
        assert all(torch.equal(held[name], was[name]) for name in was)


SELECTIONS = {
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 2, 0])), [1, 2, 0]),
    "reorder-with-repeats": (lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0]),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_a_selection_takes_the_state_along(name):
    change, indices = SELECTIONS[name]
    model, (ids, mask) = tiny.llama(layers=2), batch()
    changed, same = two_caches(model)
    further = tiny.prompt(24, seed=8, batch=3)
    for cache in (changed, same):
        play(model, cache, ids, mask, further, [1] * 6)
    change(changed)
    mask = torch.cat([mask, torch.ones(3, 6, dtype=torch.long)], 1)
    for step in range(6, 24):
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
        new, at = further[:, step : step + 1], mask.sum(1, keepdim=True) - 1
        expected = logits(model, new, same, attention_mask=mask, position_ids=at)
        found = logits(model, new[indices], changed, attention_mask=mask[indices], position_ids=at[indices])
        torch.testing.assert_close(found, expected[indices], atol=1e-4, rtol=1e-4)
    for mine, its in zip(states(changed), states(same), strict=True):
        for field, tensor in its.items():
            torch.testing.assert_close(mine[field], tensor[indices], atol=2e-5, rtol=1e-5)


def test_what_was_generated_can_be_taken_back_while_nothing_of_it_is_folded_in():
    model, ids, more = tiny.llama(layers=2), tiny.prompt(31), tiny.prompt(9, seed=5)
    cropped, plain = two_caches(model, headwise.SnapKV(keep=9, of="prompt"), prompt_tokens=31)
    for cache in (cropped, plain):
        logits(model, ids, cache)
    before = copy.deepcopy(states(cropped))
    logits(model, more, cropped)
    assert cropped.is_croppable
    cropped.crop(-7)
    logits(model, more[:, :2], plain)
    for held, was in zip(states(cropped), before, strict=True):
        assert was
        assert all(torch.equal(held[name], was[name]) for name in was)
    torch.testing.assert_close(logits(model, ids[:, :3], cropped), logits(model, ids[:, :3], plain))
    with pytest.raises(CacheStateError, match=r"does not return; reset\(\)"):
        cropped.crop(-6)


def test_what_may_have_been_folded_in_cannot_be_taken_back():
    model = tiny.llama(layers=2)
    cache = remembering(model, SMALL)
    logits(model, tiny.prompt(31), cache)
    before = copy.deepcopy(states(cache))
    with pytest.raises(CacheStateError, match=r"does not return; reset\(\)"):
        cache.crop(-1)
    assert all(
        torch.equal(held["less_sums"], was["less_sums"]) for held, was in zip(states(cache), before, strict=True)
    )


@pytest.mark.parametrize("policy", [SMALL, SCORED], ids=lambda policy: policy.name)
def test_drafts_that_are_refused_are_not_folded_in(policy):
    model, ids, draft = tiny.llama(layers=2), tiny.prompt(31), tiny.prompt(6, seed=6)
    drafting, plain = two_caches(model, policy, prompt_tokens=31)
    logits(model, ids, plain)
    logits(model, draft[:, :2], plain)
    drafting.activate_past_recording()
    logits(model, ids, drafting)
    drafting.crop(0)
    logits(model, draft, drafting)
    drafting.crop(-4)
    same_states(drafting, plain, 1e-5)
    torch.testing.assert_close(logits(model, ids[:, :3], drafting), logits(model, ids[:, :3], plain))


@pytest.mark.parametrize("way", ["file", "copy"])
@pytest.mark.parametrize("policy", [SMALL, SCORED, headwise.Full()], ids=lambda policy: policy.name)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_saved_cache_goes_on_as_it_was(family, policy, way, tmp_path):
    model = models.shared(family)
    networks = networks_of(model, models.full_layers(family))
    cache = remembering(model, policy, networks, page_size=5)
    logits(model, models.prompt(29), cache)
    logits(model, models.prompt(1), cache)
    if way == "file":
        cache.save(tmp_path / "cache")
        loaded = headwise.HeadwiseCache.load(
            tmp_path / "cache", model, cache.policy, tokenizer=TOKENIZER, evict_every=1, page_size=3
        )
    else:
        loaded = copy.deepcopy(cache)
    same_states(loaded, cache)
    assert loaded.report().used_bytes == cache.report().used_bytes
    for token in range(11, 24):
        one, other = (logits(model, torch.tensor([[token]]), each) for each in (cache, loaded))
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    same_states(loaded, cache, 1e-5)


def test_a_cache_saved_with_other_kernels_is_refused(tmp_path):
    model = tiny.llama(layers=2)
    cache = remembering(model, SMALL)
    logits(model, tiny.prompt(29), cache)
    cache.save(tmp_path / "cache")
    other = headwise.Less(SMALL, kernels_of(model, {i: draw(2, 3, 14, seed=9) for i in range(2)}))
    for policy in (SMALL, other):
        with pytest.raises(headwise.MismatchError, match="saved with Less"):
            headwise.HeadwiseCache.load(tmp_path / "cache", model, policy)


def test_offload_and_prefetch_move_the_state():
    model, ids = tiny.llama(layers=2), tiny.prompt(29)
    moved, plain = two_caches(model)
    for cache in (moved, plain):
        logits(model, ids, cache)
    for layer in moved.layers:
        layer.offload()
        layer.prefetch()
    torch.testing.assert_close(logits(model, ids[:, :1], moved), logits(model, ids[:, :1], plain))
    layer = moved.headwise_layers[0]
    layer.device = torch.device("meta")
    layer.prefetch()
    assert {tensor.device.type for tensor in layer.core.evicted.state().values()} == {"meta"}
    # The kernels are not the cache's own.
    assert layer.core.evicted.features.key_in.device.type == "cpu"


# Captured steps.


@pytest.mark.parametrize("prompt", [5, 23], ids=["nothing-yet", "more-and-more"])
def test_a_replayed_step_reads_what_was_folded_in_since(prompt):
    model, ids = tiny.llama(layers=1), tiny.prompt(prompt, batch=2)
    plain, graphed = two_caches(model, SCORED, kernel="reference", evict_every=4, page_size=4)
    for cache in (plain, graphed):
        logits(model, ids, cache)
        assert bool(states(cache)[0]) == (prompt > 9)
    further = tiny.prompt(13, seed=3, batch=2)
    with DecodeGraph(model, graphed, room=7, capture=traced) as graph:
        for new in further.split(1, dim=1):
            torch.testing.assert_close(graph.step(new), logits(model, new, plain)[:, -1], atol=1e-5, rtol=1e-5)
    assert states(plain)[0]["less_sums"].abs().max() > 0.1
    same_states(graphed, plain, 1e-5)


@pytest.mark.parametrize("kernel", ["reference", "cpu"])
def test_a_step_does_not_wait_between_evictions(kernel):
    model, ids = tiny.llama(layers=2), tiny.prompt(30)
    cache = remembering(model, SCORED, evict_every=16, kernel=kernel)
    logits(model, ids, cache)
    assert all(states(cache))
    for _ in range(9):
        logits(model, ids[:, :1], cache)
    with NeverWaits():
        for step in range(9, 15):
            logits(model, ids[:, :1], cache, position_ids=torch.full((1, 1), 30 + step))


# What is refused, and what is only said.


def test_kernels_of_another_model_are_refused():
    kernels = kernels_of(tiny.llama(layers=2), networks_of(tiny.llama(layers=2)))
    with pytest.raises(headwise.MismatchError, match="train some for this model with `headwise train-less`"):
        headwise.HeadwiseCache(tiny.llama(layers=2, seed=1), headwise.Less(SMALL, kernels))


def test_a_policy_that_the_kernels_have_not_seen_is_named():
    model = tiny.llama(layers=2)
    kernels = kernels_of(model, networks_of(model), policies=("h2o:heavy=0.1,recent=0.1",))
    with pytest.warns(headwise.HeadwiseWarning, match="not trained with what StreamingLLM.* evicts"):
        headwise.HeadwiseCache(model, headwise.Less(SMALL, kernels))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        headwise.HeadwiseCache(model, headwise.Less(SCORED, kernels))


def test_a_copy_does_not_repeat_what_was_said():
    model = tiny.llama(layers=2)
    kernels = kernels_of(model, networks_of(model), policies=("h2o:heavy=0.1,recent=0.1",))
    policy = headwise.Quantized(headwise.Less(SMALL, kernels), 8)
    with pytest.warns(headwise.HeadwiseWarning, match="not trained with what StreamingLLM") as said:
        cache = headwise.HeadwiseCache(model, policy)
    assert len(said) == 1
    logits(model, tiny.prompt(40), cache)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = copy.deepcopy(copy.deepcopy(cache))
    same_states(again, cache)
    assert torch.equal(logits(model, tiny.prompt(1), again), logits(model, tiny.prompt(1), cache))


def test_the_report_says_what_is_remembered_and_what_the_kernels_take():
    model = tiny.llama(layers=2)
    networks = networks_of(model)
    cache, plain = remembering(model, SMALL, networks), headwise.HeadwiseCache(model, SMALL, evict_every=1)
    assert cache.report().memory_bytes == 0
    for each in (cache, plain):
        logits(model, tiny.prompt(40, batch=2), each)
    report, without = cache.report(), plain.report()
    # Two sequences, two layers, two KV heads, 4 features of 14 numbers and one more, 4 bytes each.
    state = 2 * 2 * 2 * 4 * 15 * 4
    assert report.memory_bytes == state
    assert [layer.memory_bytes for layer in report.layers] == [state // 2] * 2
    assert report.used_bytes == without.used_bytes + state
    assert report.allocated_bytes == without.allocated_bytes + state
    # Query and key networks, E = 24, R = 4, per layer: 6 (14 E + E R) + 2 (14 E + E R + R²).
    weights = 2 * (6 * (14 * 24 + 24 * 4) + 2 * (14 * 24 + 24 * 4 + 16)) * 4
    assert report.weight_bytes == weights
    assert report.to_dict()["memory_bytes"] == state
    assert report.to_dict()["weight_bytes"] == weights
    assert "remembered" in str(report)
    for said in ("memory_bytes", "weight_bytes"):
        assert said not in without.to_dict()
    assert "remembered" not in str(without)
