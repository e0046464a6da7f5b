"""One cache for other batches: reset, repeated, selected and reordered sequences, and other devices."""

from __future__ import annotations

import pytest
import torch

import models
import tiny
from contract import FAST, SMALL, close, family, logits, model, new_cache
from headwise import CacheStateError, Full

__all__ = ["family", "model"]


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
