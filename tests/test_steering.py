"""Steering: plain generation beside the same model steered the long way, in every family and way to generate."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

import headwise
import models
from models import COMPRESSIBLE, NEW, PADDING, PROMPT, full_layers, padded_pair
from steering_oracle import pasta_marks, steered

# Spans of the padded pair; of the first sequence two, one of which is the first token behind the padding.
SPANS = (((PADDING, PADDING + 1), (30, 35)), ((3, 9),))


def heads_of(family):
    """Some heads of some of the layers that can be steered; of a group one."""
    first, *rest = full_layers(family)
    return {first: [0, 2], rest[-1]: [1]} if rest else {first: [0]}


def new(model, policy=None, steering=None, spans=SPANS, columns=PROMPT, **options):
    cache = headwise.HeadwiseCache(model, policy or headwise.Full(), steering=steering, **options)
    if steering is not None:
        cache.mark(headwise.Marked(spans, columns))
    return cache


def generated(model, ids, mask, cache, **options):
    settings = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    torch.manual_seed(4)
    return model.generate(ids, attention_mask=mask, past_key_values=cache, **settings | options)


def check(model, heads, marks, cache, ids, mask, *, target=None, **options):
    with steered(model, heads, marks, target):
        expected = generated(model, ids, mask, DynamicCache(config=model.config), **options)
    found = generated(model, ids, mask, cache, **options)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(
        torch.stack(found.logits), torch.stack(expected.logits), atol=2e-4, rtol=2e-4, equal_nan=True
    )
    return found


@pytest.mark.shapes
@pytest.mark.parametrize("family", COMPRESSIBLE)
def test_every_family_is_steered(family):
    """Grouped queries, a soft cap, sink logits, sliding layers; padding is not steered, nor what is generated."""
    model, (ids, mask) = models.shared(family), padded_pair()
    heads, marks = heads_of(family), pasta_marks(SPANS, mask)
    found = check(model, heads, marks, new(model, steering=headwise.Steering(heads)), ids, mask)
    plain = generated(model, ids, mask, new(model))
    assert not torch.allclose(torch.stack(found.logits), torch.stack(plain.logits), atol=1e-2)


WAYS = {
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 1.3},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "beam samples": {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_generate(way):
    model, (ids, mask) = models.shared("llama"), padded_pair()
    heads = heads_of("llama")
    check(model, heads, pasta_marks(SPANS, mask), new(model, steering=headwise.Steering(heads)), ids, mask, **WAYS[way])


@pytest.mark.parametrize("steering", ["alpha", "sinks", "boost", "target"])
def test_every_kind_of_steering(steering):
    model, (ids, mask) = models.shared("qwen3"), padded_pair()
    heads, marked = heads_of("qwen3"), pasta_marks(SPANS, mask, alpha=2.718281828459045) == 0
    marked = (marked & mask.bool()).double()
    kinds = {
        "alpha": (headwise.Steering(heads, 0.3), pasta_marks(SPANS, mask, 0.3), None),
        "sinks": (headwise.Steering(heads, 0.1, keep_sinks=3), pasta_marks(SPANS, mask, 0.1, unscaled=3), None),
        "boost": (headwise.Boost(heads, 7), marked * torch.tensor(7.0).log(), None),
        "target": (headwise.TargetShare(heads, 0.4), marked, 0.4),
    }
    made, marks, target = kinds[steering]
    check(model, heads, marks, new(model, steering=made), ids, mask, target=target)


def test_every_head_of_every_layer():
    model, (ids, mask) = models.shared("gemma3"), padded_pair()
    heads = {layer: range(4) for layer in full_layers("gemma3")}
    cache = new(model, steering=headwise.Steering.every_head(alpha=0.05))
    check(model, heads, pasta_marks(SPANS, mask, 0.05), cache, ids, mask)


@pytest.mark.parametrize("chunk", [7, 16])
def test_a_prompt_in_parts(chunk):
    model, (ids, mask) = models.shared("llama"), padded_pair()
    heads, marks = heads_of("llama"), pasta_marks(SPANS, mask)
    with steered(model, heads, marks):
        expected = generated(model, ids, mask, DynamicCache(config=model.config))
    cache = new(model, steering=headwise.Steering(heads), prompt_tokens=PROMPT)
    found = generated(model, ids, mask, cache, prefill_chunk_size=chunk)
    assert torch.equal(found.sequences, expected.sequences)


def test_a_further_turn_is_marked_too():
    """What was generated in between is not scaled, and what was marked before stays so."""
    model, ids = models.shared("llama"), models.prompt(seed=2)
    heads, spans = heads_of("llama"), (((3, 9),),)
    cache = new(model, steering=headwise.Steering(heads), spans=spans)
    with torch.no_grad():
        told = generated(model, ids, torch.ones_like(ids), cache).sequences
    turn = torch.cat([told, models.prompt(11, seed=3)], dim=1)
    seen, whole = cache.get_seq_length(), turn.shape[1]
    cache.mark(headwise.Marked((((3, 9), (whole - 6, whole - 2)),), whole))
    found = generated(model, turn, torch.ones_like(turn), cache)
    marks = torch.zeros(1, whole, dtype=torch.float64)
    marks[:, :PROMPT] = pasta_marks(spans, torch.ones_like(ids))
    marks[:, seen:] = pasta_marks((((whole - 6, whole - 2),),), torch.ones_like(turn))[:, seen:]
    with steered(model, heads, marks):
        stock = DynamicCache(config=model.config)
        expected = generated(model, ids, torch.ones_like(ids), stock).sequences
        assert torch.equal(expected, told)
        expected = generated(model, turn, torch.ones_like(turn), stock)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=2e-4, rtol=2e-4)


def test_a_further_turn_without_marks_counts_like_what_is_generated():
    model, ids, heads = models.shared("llama"), models.prompt(seed=2), heads_of("llama")
    cache = new(model, steering=headwise.Steering(heads), spans=(((3, 9),),))
    told = generated(model, ids, torch.ones_like(ids), cache).sequences
    turn = torch.cat([told, models.prompt(11, seed=3)], dim=1)
    found = generated(model, turn, torch.ones_like(turn), cache)
    with steered(model, heads, pasta_marks((((3, 9),),), torch.ones_like(ids))):
        stock = DynamicCache(config=model.config)
        generated(model, ids, torch.ones_like(ids), stock)
        expected = generated(model, turn, torch.ones_like(turn), stock)
    assert torch.equal(found.sequences, expected.sequences)


@pytest.mark.parametrize("why", ["alpha is 1", "nothing is marked", "nothing was said", "all is marked"])
def test_what_changes_nothing(why):
    model, (ids, mask) = models.shared("llama"), padded_pair()
    steering = headwise.Steering.every_head(alpha=1 if why == "alpha is 1" else 0.01)
    spans = {"nothing is marked": ((), ()), "all is marked": (((PADDING, PROMPT),), ((0, PROMPT),))}.get(why, SPANS)
    cache = headwise.HeadwiseCache(model, headwise.Full(), steering=steering)
    if why != "nothing was said":
        cache.mark(headwise.Marked(spans, PROMPT))
    found, plain = (torch.stack(generated(model, ids, mask, each).logits) for each in (cache, new(model)))
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-5)


def test_a_sequence_is_steered_alone_as_in_a_batch():
    model, (ids, mask) = models.shared("llama"), padded_pair()
    steering = headwise.Steering(heads_of("llama"))
    together = torch.stack(generated(model, ids, mask, new(model, steering=steering)).logits)
    spans = tuple((start - PADDING, stop - PADDING) for start, stop in SPANS[0])
    alone = new(model, steering=steering, spans=(spans,), columns=PROMPT - PADDING)
    found = generated(model, ids[:1, PADDING:], mask[:1, PADDING:], alone)
    torch.testing.assert_close(torch.stack(found.logits)[:, 0], together[:, 0], atol=2e-4, rtol=2e-4)


def test_copies_saved_and_selected_caches_go_on_steered(tmp_path):
    model, (ids, mask) = models.shared("llama"), padded_pair()
    steering = headwise.Steering(heads_of("llama"))
    cache = new(model, steering=steering)
    step, wide = torch.tensor([[9], [10]]), torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask, past_key_values=cache)
        cache.save(tmp_path / "cache")
        several = [
            copy.deepcopy(cache),
            headwise.HeadwiseCache.load(tmp_path / "cache", model, headwise.Full(), steering=steering),
        ]
        turned = copy.deepcopy(cache)
        turned.reorder_cache(torch.tensor([1, 0]))
        expected = model(input_ids=step, attention_mask=wide, past_key_values=cache).logits
        for each in several:
            found = model(input_ids=step, attention_mask=wide, past_key_values=each).logits
            assert torch.equal(found, expected)
        found = model(input_ids=step.flip(0), attention_mask=wide.flip(0), past_key_values=turned).logits
    torch.testing.assert_close(found.flip(0), expected, atol=1e-5, rtol=1e-5)
    for other in (None, headwise.Steering(heads_of("llama"), 0.1)):
        with pytest.raises(headwise.MismatchError, match="the cache was saved with Steering"):
            headwise.HeadwiseCache.load(tmp_path / "cache", model, headwise.Full(), steering=other)


def test_a_reset_cache_forgets_what_was_marked():
    model, (ids, mask) = models.shared("llama"), padded_pair()
    cache, plain = new(model, steering=headwise.Steering.every_head()), new(model)
    generated(model, ids, mask, cache)
    cache.reset()
    found, expected = (torch.stack(generated(model, ids, mask, each).logits) for each in (cache, plain))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_tokens_that_are_taken_back_are_marked_when_they_come_again():
    model, ids = models.shared("llama"), models.prompt(seed=2)
    heads, spans = heads_of("llama"), (((3, 9), (36, 38)),)
    expected = new(model, steering=headwise.Steering(heads), spans=spans)
    with torch.no_grad():
        logits = model(input_ids=ids, past_key_values=expected).logits
        cache = new(model, steering=headwise.Steering(heads), spans=spans)
        model(input_ids=ids, past_key_values=cache)
        cache.crop(-5)
        found = model(input_ids=ids[:, -5:], past_key_values=cache).logits
    torch.testing.assert_close(found, logits[:, -5:], atol=1e-4, rtol=1e-4)
