"""Ways to call a model with a cache: embeddings, positional arguments, masks of all kinds, markers."""

from __future__ import annotations

import inspect

import pytest
import torch

import models
from contract import FAST, SMALL, close, columns, family, logits, model, new_cache
from headwise import FastGen, Full, InputError, UnsupportedModelError

__all__ = ["family", "model"]


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
