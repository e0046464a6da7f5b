"""More ways to generate than those of the matrix, over its families: with nothing evicted, the ids are stock's.

Beams in groups, beams under constraints, contrastive search and DoLa are not here: transformers 5 has them no longer,
and fetches them as code from its Hub.
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import transformers
from transformers import DynamicCache, WatermarkingConfig

import headwise
import models
from cases import EVERYTHING, singly
from lettered import tokenizer
from models import COMPRESSIBLE, FAMILIES, NEW, PROMPT, generate

PREFIX = 17


def option(**options):
    """A way that is `generate` with these."""
    return lambda model, cache: generate(model, models.prompt(), cache, **options)


def sampled_beams(model, cache):
    torch.manual_seed(7)
    return option(do_sample=True, num_beams=3, temperature=1.3)(model, cache)


@functools.cache
def assistant(model):
    """It guesses much as the model does, and not always."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in other.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=generator)
    # As many guesses each time, or none would be left after the first were wrong.
    other.generation_config.num_assistant_tokens = 3
    other.generation_config.num_assistant_tokens_schedule = "constant"
    other.generation_config.assistant_confidence_threshold = 0.0
    return other


def assisted(model, cache):
    return option(assistant_model=assistant(model))(model, cache)


def whole(model, cache):
    """The cache that is used, where it is none of ours."""
    return DynamicCache(config=model.config) if cache is None else cache


def read(model, cache, ids, **options):
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True, **options).logits


def shared_prefix(model, cache):
    """Two continuations of one prefix, each in a copy."""
    cache = whole(model, cache)
    read(model, cache, models.prompt()[:, :PREFIX])
    outs = []
    for seed in (0, 5):
        ids = torch.cat([models.prompt()[:, :PREFIX], models.prompt(seed=seed)[:, PREFIX:]], dim=1)
        outs.append(generate(model, ids, copy.deepcopy(cache)))
    assert cache.get_seq_length() == PREFIX
    return torch.cat(outs)


def from_embeddings(model, cache):
    ids = models.prompt()
    embedded = model.get_input_embeddings()(ids).detach()
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "do_sample": False, "pad_token_id": 2}
    return model.generate(inputs_embeds=embedded, past_key_values=cache, **options)


def right_padded(model, cache):
    """A batch of one length, filled up behind."""
    ids, mask = models.prompt(seed=1).repeat(2, 1), torch.ones(2, PROMPT, dtype=torch.long)
    ids[0, -9:], mask[0, -9:] = 2, 0
    return generate(model, ids, cache, attention_mask=mask)


def placed(positions):
    """Step by step, with positions that are handed in: those of the prompt, and then one after the other."""

    def way(model, cache):
        cache, ids = whole(model, cache), models.prompt()
        place = positions(torch.arange(PROMPT)[None])
        fresh = ids
        for _ in range(NEW):
            logits = read(model, cache, fresh, position_ids=place)
            fresh, place = logits[:, -1:].argmax(-1), place[:, -1:] + 1
            ids = torch.cat([ids, fresh], dim=1)
        return ids

    return way


def went_on(model, cache):
    """Half of it, and then the rest."""
    cache = whole(model, cache)
    half = generate(model, models.prompt(), cache, max_new_tokens=NEW // 2)
    return generate(model, half, cache, max_new_tokens=NEW // 2)


@functools.cache
def stop_token(model):
    """A letter that comes up on the way, found without a cache of ours, and is in no other token."""
    letters = tokenizer()
    special = "".join(letters.all_special_tokens)
    ids = generate(model, models.prompt())[0, PROMPT + 4 :].tolist()
    return next(token for token in ids if 20 < token < 97 and letters.decode([token]) not in special)


def stopped(model, cache):
    letters = tokenizer()
    return option(stop_strings=[letters.decode([stop_token(model)])], tokenizer=letters)(model, cache)


WAYS = {
    "beam-sampling": sampled_beams,
    "beams-returned": option(num_beams=4, num_return_sequences=3),
    "penalized-beams": option(num_beams=3, length_penalty=0.3, early_stopping=True, no_repeat_ngram_size=2),
    "assisted": assisted,
    "prefix": shared_prefix,
    "embeddings": from_embeddings,
    "right-padded": right_padded,
    "placed-later": placed(lambda columns: columns + 11),
    "packed": placed(lambda columns: columns % 15),
    "went-on": went_on,
    "guided": option(guidance_scale=1.8),
    "watermark": option(watermarking_config=WatermarkingConfig(bias=4.0)),
    "stop-strings": stopped,
}


@functools.cache
def reference(family, way):
    """The ids with transformers' own cache."""
    return WAYS[way](models.shared(family), None)


# Of these it is looked at what they do to the cache.
WATCHED = ("beams-returned", "assisted")


def new_cache(model, policy, kind=headwise.HeadwiseCache, **options):
    return kind(model, policy, evict_every=1, **options)


def run(family, way, policy, **options):
    model = models.shared(family)
    # What is found with transformers' own cache must be found before.
    reference(family, way)
    cache = new_cache(model, policy, models.WatchedCache if way in WATCHED else headwise.HeadwiseCache, **options)
    return WAYS[way](model, cache), cache


# Of an assistant with a sliding window it masks what the window has let go of.
OLDEST = transformers.__version__.startswith("5.17.")
SLIDING = (*models.MIXED, models.ALL_SLIDING)


@singly(way=WAYS, family=FAMILIES)
def test_with_nothing_evicted_the_ids_are_those_of_the_stock_cache(family, way):
    if way == "assisted" and family in SLIDING and OLDEST:
        with pytest.raises(RuntimeError, match="The size of tensor"):
            reference(family, way)
        return
    out, cache = run(family, way, headwise.Full())
    assert torch.equal(out, reference(family, way))
    CHECKS.get(way, lambda *_: None)(family, out, cache)


# That each did what it is here for.


def differs(family, out, _):
    greedy = option()(models.shared(family), None)
    assert out.shape[1] != greedy.shape[1] or not torch.equal(out[:1], greedy)


def several(family, out, cache):
    assert len({tuple(row.tolist()) for row in out}) == 3
    assert any(len(set(order)) < len(order) for order in cache.log.orders)


def guessed(family, out, cache):
    taken_back, given = sum(cache.log.removed), sum(columns for _, columns in cache.log.passes)
    # Fewer passes than tokens, and guesses that were wrong.
    assert len(cache.log.passes) < NEW
    assert 0 < taken_back < given - PROMPT
    assert torch.equal(out, option()(models.shared(family), None))


def is_greedy(family, out, _):
    assert torch.equal(out, option()(models.shared(family), None))


def new_tokens_alone(family, out, _):
    assert torch.equal(out, option()(models.shared(family), None)[:, PROMPT:])


def ends_early(family, out, _):
    assert out.shape[1] < PROMPT + NEW
    assert out[0, -1] == stop_token(models.shared(family))


CHECKS = {
    "beam-sampling": differs,
    "beams-returned": several,
    "assisted": guessed,
    "embeddings": new_tokens_alone,
    "packed": differs,
    "went-on": is_greedy,
    "guided": differs,
    "watermark": differs,
    "stop-strings": ends_early,
}


# With a policy that evicts: what a way has in common with plain generation.

POLICY = headwise.H2O(heavy=5, recent=6)


def plain(family, ids):
    cache = new_cache(models.shared(family), POLICY)
    return generate(models.shared(family), ids, cache), cache


def same_rows(one, other):
    for mine, its in zip(one.report().kept_tokens, other.report().kept_tokens, strict=True):
        assert (mine is None) == (its is None)
        assert mine is None or torch.equal(mine, its)


@singly(way=["embeddings", "went-on", "stop-strings"], family=COMPRESSIBLE if EVERYTHING else COMPRESSIBLE[::3])
def test_what_evicts_goes_the_same_way(family, way):
    expected, its = plain(family, models.prompt())
    found, cache = run(family, way, POLICY)
    if way == "embeddings":
        expected = expected[:, PROMPT:]
    elif way == "stop-strings":
        expected = expected[:, : found.shape[1]]
    assert torch.equal(found, expected)
    if way != "stop-strings":
        same_rows(cache, its)


@pytest.mark.parametrize("family", COMPRESSIBLE if EVERYTHING else ["llama", "gemma3"])
def test_copies_of_a_prefix_go_on_as_what_was_not_copied(family):
    model, ids = models.shared(family), models.prompt()
    caches = [new_cache(model, POLICY, prompt_tokens=PREFIX) for _ in range(2)]
    for cache in caches:
        read(model, cache, ids[:, :PREFIX])
    ended = copy.deepcopy(caches[0])
    outs = [generate(model, ids, cache) for cache in (ended, caches[1])]
    assert torch.equal(*outs)
    same_rows(ended, caches[1])
    # What went on in the copy is none of the original's.
    assert torch.equal(generate(model, ids, caches[0]), outs[0])
