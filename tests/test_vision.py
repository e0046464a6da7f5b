"""Models that see: images and videos in the prompt, what policies make of their tokens, and where these stand."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import headwise
import seeing
import tiny
from cases import pairwise
from headwise import (
    H2O,
    Auto,
    ExpectedAttention,
    FastGen,
    Full,
    HeadwiseWarning,
    KeepMedia,
    KVzip,
    Match,
    Quantized,
    SnapKV,
    StreamingLLM,
)
from headwise.errors import CacheStateError, ConfigurationError, InputError, UnsupportedModelError
from seeing import (
    BEGIN,
    END,
    FAMILIES,
    IDS,
    IN_GRIDS,
    NEW,
    PATCHES,
    VIDEO,
    generate,
    new_cache,
    picture,
    shared,
    turn,
    words,
)

# Its models that see have not all of what they have now.
OLDEST = transformers.__version__.startswith("5.17.")


def stock(family):
    return DynamicCache(config=shared(family).config.get_text_config())


# With nothing evicted.


def alone(family, cache, **options):
    return generate(family, IDS, cache, max_new_tokens=NEW, **options)


def padded(family, cache):
    ids, mask = tiny.left_padded(IDS[0], seeing.prompt(3, picture(), 12, picture())[0])
    return generate(family, ids, cache, attention_mask=mask, max_new_tokens=NEW)


def beside_text(family, cache):
    ids, mask = tiny.left_padded(IDS[0], seeing.prompt(9)[0])
    return generate(family, ids, cache, attention_mask=mask, max_new_tokens=NEW)


def two_turns(family, cache):
    ids = torch.cat([alone(family, cache), words(6, seed=9)], dim=1)
    return turn(family, ids, cache)


def filmed(family, cache):
    if family not in IN_GRIDS:
        pytest.skip("it sees no videos")
    frame = torch.tensor([[BEGIN, *[VIDEO] * (PATCHES // 2), END]])
    film = torch.cat([frame, frame], dim=1) if family == "qwen3-vl" else picture(VIDEO)
    return generate(family, seeing.prompt(5, film, 3, picture(), 2), cache, max_new_tokens=NEW)


WAYS = {
    "alone": alone,
    "beams": lambda family, cache: alone(family, cache, num_beams=2, num_return_sequences=2),
    "lookup": lambda family, cache: alone(family, cache, prompt_lookup_num_tokens=3),
    "chunked": lambda family, cache: alone(family, cache, prefill_chunk_size=9),
    "padded": padded,
    "beside-text": beside_text,
    "two-turns": two_turns,
    "filmed": filmed,
}


@pairwise(family=FAMILIES, way=WAYS)
def test_with_nothing_evicted_the_ids_are_those_of_the_stock_cache(family, way):
    cache = new_cache(family, Full())
    if way == "chunked" and family in IN_GRIDS and OLDEST:
        # Of the second chunk it takes no positions.
        for other, error in ((stock(family), RuntimeError), (cache, InputError)):
            with pytest.raises(error):
                WAYS[way](family, other)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error", HeadwiseWarning)
        out = WAYS[way](family, cache)
    assert torch.equal(out, WAYS[way](family, stock(family)))
    assert cache.get_seq_length() == out.shape[1] - 1


@pytest.mark.parametrize("family", FAMILIES)
def test_the_images_are_seen(family):
    """Or the tests here would say little."""
    logits = [
        generate(family, IDS, seed=seed, max_new_tokens=1, output_logits=True, return_dict_in_generate=True).logits[0]
        for seed in (0, 1)
    ]
    assert (logits[0] - logits[1]).abs().max() > 0.1


# With policies that evict.

SINKS, WINDOW = 2, 9


def windowed(module, query, key, value, attention_mask, **options):
    """Attention where a token after the prompt sees the first few, as many before it as a window has, and itself."""
    if query.shape[2] == 1:
        column = torch.arange(key.shape[2])
        seen = (column < SINKS) | (column >= key.shape[2] - WINDOW - 1)
        attention_mask = seen[None, None, None]
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma3"])
def test_what_eviction_gives_equals_stock_with_a_mask(family):
    text = shared(family).get_decoder().config
    AttentionInterface.register("windowed", windowed)
    AttentionMaskInterface.register("windowed", sdpa_mask)
    before, asked = text._attn_implementation, {"output_logits": True, "return_dict_in_generate": True}
    text._attn_implementation = "windowed"
    try:
        expected = generate(family, IDS, **asked)
    finally:
        text._attn_implementation = before
    found = generate(family, IDS, new_cache(family, StreamingLLM(window=WINDOW, sinks=SINKS), evict_every=1), **asked)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=1e-4, rtol=1e-4)
    assert torch.equal(found.sequences, expected.sequences)


@pairwise(family=FAMILIES, policy=[H2O(heavy=4, recent=5), SnapKV(keep=9), FastGen(0.3), KeepMedia(SnapKV(keep=6))])
def test_a_row_of_a_batch_is_what_its_prompt_gives_alone(family, policy):
    other = seeing.prompt(3, picture(), 17)
    ids, mask = tiny.left_padded(IDS[0], other[0])
    batch = new_cache(family, policy, evict_every=1)
    # Each row with its own picture: the second of two that are drawn at once.
    given = seeing.shown(family, ids)
    out = generate(family, ids, batch, attention_mask=mask, **given)
    pixels = {name: value.chunk(2) for name, value in given.items()}
    for row, prompt in enumerate((IDS, other)):
        one = {name: halves[row][..., -prompt.shape[1] :] if name.endswith("type_ids") else halves[row]
               for name, halves in pixels.items()}  # fmt: skip
        cache = new_cache(family, policy, evict_every=1)
        assert torch.equal(generate(family, prompt, cache, **one), out[row : row + 1, ids.shape[1] - prompt.shape[1] :])
        for mine, its in zip(cache.report().kept_tokens, batch.report().kept_tokens, strict=True):
            assert mine is None or torch.equal(mine, its[row : row + 1])


# What is refused.


def test_what_cannot_be_wrapped_is_refused():
    for bad, says in (
        (lambda: KeepMedia(Quantized(Full())), re.escape("Quantized(KeepMedia(...))")),
        (lambda: KeepMedia(KeepMedia(Full())), "KeepMedia wraps a policy"),
        (lambda: KeepMedia("h2o"), "got 'h2o'"),
        (lambda: headwise.HeadwiseCache(tiny.llama(), KeepMedia(Full())), "LlamaForCausalLM has none"),
        (
            lambda: headwise.HeadwiseCache(shared("llava"), KeepMedia(Full()), markers=["w9"]),
            "markers are texts and need a tokenizer",
        ),
    ):
        with pytest.raises(ConfigurationError, match=says):
            bad()


@pytest.mark.parametrize("policy", [KVzip(keep=8), Auto(ratio=0.5), KeepMedia(KVzip(keep=8))], ids=str)
def test_a_prompt_with_images_is_not_repeated(policy):
    cache = new_cache("llava", policy)
    with pytest.raises(InputError, match=rf"{PATCHES} of these tokens stand for images"):
        generate("llava", IDS, cache)
    # Nothing was taken in, so a text may follow; and images may follow it.
    ids = torch.cat([generate("llava", seeing.prompt(20), cache, max_new_tokens=NEW), picture()], dim=1)
    turn("llava", ids, cache, pixel_values=seeing.pixels(1, 3, 8, 8, seed=0))


@pytest.mark.parametrize("policy", [ExpectedAttention(keep=8), Match(SnapKV(keep=8, window=4))], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_queries_are_not_turned_back_from_where_they_are_not(family, policy):
    if family in IN_GRIDS and OLDEST:
        with pytest.raises(UnsupportedModelError, match="makes positions is not known"):
            new_cache(family, policy)
        return
    generate(family, seeing.prompt(20), new_cache(family, policy), max_new_tokens=2)
    if family in IN_GRIDS:
        with pytest.raises(InputError, match=f"{type(policy).__name__} takes every token to be where its number"):
            generate(family, IDS, new_cache(family, policy))
    else:
        generate(family, IDS, new_cache(family, policy), max_new_tokens=2)


def test_positions_that_are_handed_in_are_looked_at_too():
    model, ids = tiny.llama(), tiny.prompt(12)
    packed = torch.arange(12)[None] % 6
    cache = headwise.HeadwiseCache(model, ExpectedAttention(keep=5))
    with pytest.raises(InputError, match="several texts in one row"):
        model(ids, position_ids=packed, past_key_values=cache)
    cache = headwise.HeadwiseCache(model, Full())
    model(ids, position_ids=packed, past_key_values=cache)
    with pytest.raises(CacheStateError, match="a captured step counts positions by itself"):
        headwise.DecodeGraph(model, cache, capture=lambda step: step)


# Where tokens stand after an image on several axes, only the model knows.


@pytest.mark.parametrize("family", IN_GRIDS)
@pytest.mark.parametrize("how", ["another prompt", "copied", "loaded"])
def test_a_turn_that_does_not_go_on_from_the_image_before_is_warned_of(family, how, tmp_path):
    model, cache = shared(family), new_cache(family, Full())
    ids = torch.cat([alone(family, cache), words(5, seed=9)], dim=1)
    if how == "copied":
        cache = copy.deepcopy(cache)
    elif how == "loaded":
        cache.save(tmp_path / "seen.safetensors")
        cache = headwise.HeadwiseCache.load(tmp_path / "seen.safetensors", model, Full())
    other = copy.deepcopy(cache)
    generate(family, seeing.prompt(8), max_new_tokens=2)
    with pytest.warns(HeadwiseWarning, match=r"stand \+12 positions off from where sequence 0 ended"):
        wrong = turn(family, ids, cache)
    # As it says: with what the processor said of the images it is right, and silent.
    about = {name: value for name, value in seeing.shown(family, ids).items() if name != "pixel_values"}
    model.model.rope_deltas = None
    with warnings.catch_warnings():
        warnings.simplefilter("error", HeadwiseWarning)
        right = turn(family, ids, other, **about)
    assert torch.equal(right, two_turns_of(family, ids))
    assert not torch.equal(right, wrong)


@pytest.mark.parametrize("family", IN_GRIDS)
def test_what_is_known_of_positions_goes_with_the_sequences(family):
    cache, (ids, mask) = new_cache(family, Full()), tiny.left_padded(IDS[0], seeing.prompt(9)[0])
    generate(family, ids, cache, attention_mask=mask, max_new_tokens=2)
    assert cache.token_log.told.shift.tolist() == [-12, 0]
    cache.batch_select_indices(torch.tensor([1]))
    seen = cache.get_seq_length()
    mask = torch.cat([mask[1:], torch.ones(1, seen + 3 - mask.shape[1], dtype=torch.long)], dim=1)
    place = torch.arange(3)[None] + int(mask.sum()) - 3
    with warnings.catch_warnings():
        warnings.simplefilter("error", HeadwiseWarning)
        shared(family)(words(3), past_key_values=cache, attention_mask=mask, position_ids=place)
    assert cache.token_log.told.shift.tolist() == [0]


def two_turns_of(family, ids):
    cache = stock(family)
    alone(family, cache)
    return turn(family, ids, cache)


@pytest.mark.shapes
@pytest.mark.parametrize("family", seeing.FAMILIES)
def test_text_beside_a_picture_may_be_marked_and_a_picture_not(family):
    model, ids = seeing.shared(family), seeing.prompt(5, picture(), 12)
    given = seeing.shown(family, ids)
    steering, columns = headwise.Steering.every_head(alpha=0.05), ids.shape[1]
    at = int((ids[0] == seeing.IMAGE).int().argmax())
    found = []
    for span in (None, (columns - 6, columns - 3)):
        cache = headwise.HeadwiseCache(model, Full(), steering=steering)
        if span is not None:
            cache.mark(headwise.Marked(((span,),), columns))
        with torch.no_grad():
            found.append(model(input_ids=ids, past_key_values=cache, **given).logits[0, -1])
    assert not torch.allclose(*found, atol=1e-3)
    # The first of its tokens, and one behind others.
    for span in ((at - 1, at + 1), (at + 2, columns)):
        cache = headwise.HeadwiseCache(model, Full(), steering=steering)
        cache.mark(headwise.Marked(((span,),), columns))
        where = f"token {max(span[0], at)} is marked and stands for an image"
        with pytest.raises(headwise.InputError, match=where), torch.no_grad():
            model(input_ids=ids, past_key_values=cache, **given)
