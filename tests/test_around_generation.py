"""Generation by way of others: pipelines, streams out of another thread, guidance, watermarks and stop strings."""

from __future__ import annotations

import functools
import threading

import pytest
import torch
from transformers import (
    DynamicCache,
    TextIteratorStreamer,
    WatermarkDetector,
    WatermarkingConfig,
    pipeline,
)

import headwise
import tiny
from headwise.errors import InputError
from lettered import tokenizer

IDS = tiny.prompt(30)
GREEDY = {"max_new_tokens": 8, "do_sample": False}
EVICTS = headwise.H2O(heavy=4, recent=5)
POLICIES = [headwise.Full(), EVICTS]


@functools.cache
def model():
    return tiny.llama()


def cache(policy, **options):
    return headwise.HeadwiseCache(model(), policy, **options)


def generate(given, ids=IDS, **options):
    return model().generate(ids, past_key_values=given, attention_mask=torch.ones_like(ids), **GREEDY | options)


# Pipelines.

TEXTS = ["a few words of it", "and some more words than those", "the last ones"]


def texts(outputs):
    return [output[0]["generated_text"] for output in outputs]


@pytest.fixture
def write():
    return pipeline("text-generation", model=model(), tokenizer=tokenizer())


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_pipeline_writes_what_the_model_generates(write, policy):
    for text in TEXTS:
        ids = tokenizer()(text, return_tensors="pt").input_ids
        expected = tokenizer().decode(generate(cache(policy), ids)[0], skip_special_tokens=True)
        assert texts([write(text, past_key_values=cache(policy), **GREEDY)]) == [expected]
        if policy == headwise.Full():
            assert texts([write(text, **GREEDY)]) == [expected]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_batch_of_a_pipeline_is_what_its_prompts_give_alone(write, policy):
    alone = texts(write(text, past_key_values=cache(policy), **GREEDY) for text in TEXTS)
    assert texts(write(TEXTS, batch_size=3, past_key_values=cache(policy), **GREEDY)) == alone


def test_one_cache_for_several_prompts_of_a_pipeline_is_refused(write):
    """With batches of different size too."""
    with pytest.raises(InputError, match=r"the cache has seen \d+ tokens, and generate\(\) was given \d+"):
        write([TEXTS[0], TEXTS[2]], past_key_values=cache(headwise.Full()), **GREEDY)
    with pytest.raises(InputError):
        write(TEXTS, batch_size=2, past_key_values=cache(headwise.Full()), **GREEDY)


# Options of `generate`.


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_stream_out_of_another_thread(policy):
    """The model is as it was in this one meanwhile."""
    plain = model()(IDS).logits
    streamer = TextIteratorStreamer(tokenizer(), skip_prompt=True)
    thread = threading.Thread(target=generate, args=(cache(policy),), kwargs={"streamer": streamer})
    thread.start()
    parts = []
    for part in streamer:
        parts.append(part)
        torch.testing.assert_close(model()(IDS).logits, plain, atol=1e-5, rtol=1e-5)
    thread.join()
    assert "".join(parts) == tokenizer().decode(generate(cache(policy))[0, 30:])
    assert torch.equal(model()(IDS).logits, plain)


GUIDED = {"guidance_scale": 1.8}
NEGATIVE = GUIDED | {"negative_prompt_ids": tiny.prompt(9, seed=4)}


@pytest.mark.parametrize("options", [GUIDED, NEGATIVE], ids=["guided", "negative"])
def test_guidance_has_a_cache_of_its_own_beside_ours(options):
    """The unconditional passes are of the same model, between ours."""
    ours = cache(headwise.Full())
    assert not torch.equal(generate(None, **options), generate(None))
    assert torch.equal(generate(ours, **options), generate(None, **options))
    assert ours.get_seq_length() == 37
    evicted, plain = cache(EVICTS), cache(EVICTS)
    generate(evicted, **options)
    generate(plain)
    # As many rows as without: what is seen between is none of its.
    for mine, its in zip(evicted.report().kept_tokens, plain.report().kept_tokens, strict=True):
        assert torch.equal(mine, its)


@pytest.mark.parametrize(
    "options",
    [
        {"watermarking_config": WatermarkingConfig(bias=4.0)},
        {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
        {"bad_words_ids": [[93]], "min_new_tokens": 4},
        {"forced_eos_token_id": 1, "sequence_bias": {(40,): 3.0}},
    ],
    ids=["watermark", "penalty", "bad words", "bias"],
)
def test_what_changes_logits_changes_them_as_with_stock(options):
    stock = generate(DynamicCache(config=model().config), **options)
    assert not torch.equal(stock, generate(None))
    assert torch.equal(generate(cache(headwise.Full()), **options), stock)
    if "watermarking_config" in options:
        marked = generate(cache(EVICTS), **options | {"max_new_tokens": 40})
        detector = WatermarkDetector(model().config, device="cpu", watermarking_config=options["watermarking_config"])
        assert detector(marked[:, 30:], return_dict=True).z_score[0] > 3


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_stop_strings_stop(policy):
    whole = generate(cache(policy))
    # Two letters of ASCII, which are what they are wherever they stand.
    end = next(end for end in range(33, 38) if (whole[0, end - 2 : end] < 97).all())
    stop = tokenizer().decode(whole[0, end - 2 : end])
    found = generate(cache(policy), stop_strings=[stop], tokenizer=tokenizer())
    assert torch.equal(found, whole[:, :end])
