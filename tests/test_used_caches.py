"""What a used cache is given: as with transformers' own where that is right; refused or said where it is not."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import DynamicCache

import models
import tiny
from headwise import H2O, CacheStateError, Full, HeadwiseCache, HeadwiseWarning, InputError, Quantized, SnapKV

TOKENIZER = tiny.tokenizer()
CODES = Quantized(Full(), 8, recent=4)
PAIR = torch.cat([models.prompt(20), models.prompt(20, seed=1)])


def new_cache(model, policy):
    return HeadwiseCache(model, policy, tokenizer=TOKENIZER)


CASES = [("llama", Full()), ("gemma3", H2O(heavy=5, recent=6)), ("llama", SnapKV(keep=0.5)), ("gemma3", CODES)]


@pytest.fixture(params=CASES, ids=str)
def cache(request):
    """One that has seen 23 columns of two sequences."""
    made = new_cache(models.shared(request.param[0]), request.param[1])
    made.ids = models.generate(made.model, PAIR, made, max_new_tokens=4)
    return made


@pytest.fixture
def model(cache):
    return cache.model


def answered(model, cache, ids, **options):
    return models.generate(model, ids, cache, max_new_tokens=5, **options)


def longer(ids, seed=3):
    return torch.cat([ids, models.prompt(6, seed=seed)[:, 1:].expand(len(ids), -1)], dim=1)


# What would be skipped in silence, or crash in the model.


def test_ids_that_end_before_what_was_seen_are_refused_and_change_nothing(model, cache):
    for columns in (1, 12, 20, 23):
        with pytest.raises(InputError, match=rf"seen 23 tokens, and generate\(\) was given {columns}: pass the ids of"):
            answered(model, cache, PAIR[:, :1].expand(-1, columns))
    again = new_cache(model, cache.policy)
    ids = models.generate(model, PAIR, again, max_new_tokens=4)
    assert torch.equal(answered(model, cache, longer(ids)), answered(model, again, longer(ids)))


def test_of_a_cache_that_was_broken_off_that_is_said_first(model, cache):
    def fail(*_):
        raise ArithmeticError

    handle = model.get_decoder().layers[1].register_forward_hook(fail)
    with pytest.raises(ArithmeticError):
        answered(model, cache, longer(cache.ids))
    handle.remove()
    with pytest.raises(CacheStateError, match="broken off"):
        answered(model, cache, PAIR)


def test_another_prompt_is_said_and_the_conversation_itself_is_not(model, cache):
    with pytest.warns(HeadwiseWarning, match="ids that generate.. was given do not begin with them: their first 23"):
        answered(model, cache, torch.cat([models.prompt(31, seed=seed) for seed in (5, 6)]))
    cache.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids = models.generate(model, PAIR, cache, max_new_tokens=4)
        answered(model, cache, longer(answered(model, cache, longer(ids))))


def test_nothing_to_read_is_refused_and_changes_nothing(model, cache):
    with torch.no_grad():
        for ids in (torch.zeros(2, 0, dtype=torch.long), torch.zeros(0, 1, dtype=torch.long)):
            with pytest.raises(InputError, match=r"brings no tokens: its input_ids have shape .*has seen 23"):
                model(ids, past_key_values=cache)
            with pytest.raises(InputError, match=r"brings no tokens: its input_ids have shape \([02], [01]\)$"):
                model(ids, past_key_values=new_cache(model, cache.policy))
        assert model(PAIR[:, :1], past_key_values=cache).logits.isfinite().all()


def test_embeddings_go_on_as_they_did():
    """Their ids are only those that were generated: fewer than the cache has seen."""
    model = models.shared("gpt2")
    embedded = model.get_input_embeddings()(PAIR).detach()
    options = {"inputs_embeds": embedded, "attention_mask": torch.ones_like(PAIR), "max_new_tokens": 6}
    options |= {"do_sample": False, "pad_token_id": 2}
    found = model.generate(past_key_values=HeadwiseCache(model, Full()), **options)
    assert torch.equal(found, model.generate(past_key_values=DynamicCache(config=model.config), **options))


# Sequences that are dropped and repeated.

CHOSEN = {
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1], {}),
    "mask": (lambda cache: cache.batch_select_indices(torch.tensor([True, False])), [0], {}),
    "again": (lambda cache: cache.batch_select_indices(torch.tensor([1, 0, 1])), [1, 0, 1], {}),
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 1])), [1, 1], {}),
    "beams": (lambda cache: cache.batch_repeat_interleave(3), [0, 1], {"num_beams": 3}),
}


@pytest.mark.parametrize("way", CHOSEN)
def test_generation_goes_on_with_the_sequences_chosen(model, cache, way):
    change, chosen, options = CHOSEN[way]
    change(cache)
    found = answered(model, cache, longer(cache.ids[chosen]), **options)
    if options:
        # Each as it would be alone.
        for row, ids in enumerate(cache.ids):
            alone = new_cache(model, cache.policy)
            models.generate(model, PAIR[[row]], alone, max_new_tokens=4)
            alone.batch_repeat_interleave(3)
            assert torch.equal(found[[row]], answered(model, alone, longer(ids[None]), **options))
        return
    plain = new_cache(model, cache.policy)
    ids = models.generate(model, PAIR, plain, max_new_tokens=4)
    assert torch.equal(found, answered(model, plain, longer(ids))[chosen])
    if isinstance(cache.policy, Full):
        stock = DynamicCache(config=model.config)
        models.generate(model, PAIR, stock, max_new_tokens=4)
        change(stock)
        assert torch.equal(found, answered(model, stock, longer(cache.ids[chosen])))


WRONG = {
    "beyond": (torch.tensor([5]), r"holds sequences 0 to 1, and \[5\] are chosen"),
    "negative": (torch.tensor([1, -1]), r"holds sequences 0 to 1, and \[1, -1\] are chosen"),
    "numbers": (torch.tensor([0.5]), "one row of whole numbers"),
    "table": (torch.tensor([[0]]), "one row of whole numbers"),
    "list": ([1], r"got \[1\]"),
    "mask": (torch.tensor([True]), "holds 2 sequences, and 1 are said to stay or to go"),
}


def test_sequences_that_there_are_not_are_refused_and_nothing_changes(model, cache):
    for indices, message in WRONG.values():
        for change in (cache.batch_select_indices, cache.reorder_cache):
            with pytest.raises(InputError, match=message):
                change(indices)
    with pytest.raises(InputError, match="0 times or more, got -1"):
        cache.batch_repeat_interleave(-1)
    plain = new_cache(model, cache.policy)
    ids = models.generate(model, PAIR, plain, max_new_tokens=4)
    assert torch.equal(answered(model, cache, longer(ids)), answered(model, plain, longer(ids)))


def test_a_prompt_for_another_number_of_sequences_is_refused(model, cache):
    for batch in (1, 3):
        with pytest.raises(InputError, match=f"holds 2 sequences and this pass brings {batch}"):
            answered(model, cache, models.prompt(30).expand(batch, -1))
        cache.reset()
        models.generate(model, PAIR, cache, max_new_tokens=4)
