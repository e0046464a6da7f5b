"""Memory of a cache: freed at once, layer by layer, and reported as what its tensors take."""

from __future__ import annotations

import gc
import json
import weakref

import pytest
import torch
from transformers import DynamicCache

import models
import tiny
from contract import FAST, SMALL, TOKENIZER, decoder_layers, family, logits, model, new_cache
from headwise import Full
from headwise.hosts.transformers.kinds import KindTable
from headwise.policies.base import Rule

__all__ = ["family", "model"]


# Memory.


# With look-up, transformers reads all ids again, whatever its cache has seen.
@pytest.mark.filterwarnings("ignore:the tokens of this pass stand .* off:headwise.errors.HeadwiseWarning")
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
