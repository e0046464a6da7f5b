"""What stands for images is a kind of its own: ordinary, special by a marker, or kept beside what a policy keeps."""

from __future__ import annotations

import copy
import re

import pytest
import torch

import headwise
import seeing
from cases import pairwise
from headwise import (
    H2O,
    AdaKV,
    FastGen,
    Full,
    KeepMedia,
    Quantized,
    SnapKV,
    StreamingLLM,
)
from headwise.types import Kind
from seeing import (
    BEGIN,
    END,
    FAMILIES,
    IDS,
    IMAGE,
    PATCHES,
    TEXT,
    TOKENIZER,
    generate,
    new_cache,
    shared,
    turn,
    words,
)

# Tokens of images are a kind of their own.


def kinds_of(cache):
    kinds = cache.token_log.tensors()["kinds"]
    return kinds[0, : IDS.shape[1]]


@pytest.mark.parametrize("family", FAMILIES)
def test_placeholders_are_no_special_tokens(family):
    cache = new_cache(family, FastGen(0.0, ladder=("special", "full")), evict_every=1)
    generate(family, IDS, cache, max_new_tokens=1)
    assert set(TOKENIZER.all_special_ids) >= {IMAGE, BEGIN, END}
    assert torch.equal(kinds_of(cache) == int(Kind.MEDIA), IDS[0] == IMAGE)
    # BOS, and the marks around the image.
    for kept, media in zip(cache.report().kept_tokens, cache.report().kept_media, strict=True):
        assert kept is None or (kept.unique().tolist(), media.unique().tolist()) == ([3], [0])


def test_a_marker_makes_them_special():
    name = TOKENIZER.convert_ids_to_tokens(IMAGE)
    cache = new_cache("llava", FastGen(0.0, ladder=("special", "full")), evict_every=1, markers=[name])
    generate("llava", IDS, cache, max_new_tokens=1)
    assert cache.report().kept_tokens[0].unique().tolist() == [3 + PATCHES]


# What is kept of the text where the prompt ends, with all media beside.
BESIDE = {
    KeepMedia(StreamingLLM(window=4, sinks=1)): 5,
    KeepMedia(H2O(heavy=3, recent=4)): 7,
    KeepMedia(SnapKV(keep=6)): 6,
    KeepMedia(SnapKV(keep=6, window=2, choose_every=4)): 6,
    # With so few queries to ask, they would take some of the image.
    KeepMedia(SnapKV(keep=11, window=1)): 11,
    KeepMedia(AdaKV(keep=6, safeguard=1.0)): 6,
    KeepMedia(FastGen(0.0)): 3,
    KeepMedia(FastGen(keep=TEXT)): TEXT,
    Quantized(KeepMedia(SnapKV(keep=6))): 6,
    KeepMedia(Full()): TEXT,
}


@pairwise(family=FAMILIES, policy=BESIDE)
def test_media_are_kept_and_the_budget_is_for_the_text(family, policy):
    cache = new_cache(family, policy, evict_every=1, prompt_tokens=IDS.shape[1])
    given = seeing.shown(family, IDS)
    shared(family)(IDS, past_key_values=cache, **given)
    for kept, media in zip(cache.report().kept_tokens, cache.report().kept_media, strict=True):
        assert (kept is None) == (media is None)
        if kept is not None:
            assert media.unique().tolist() == [PATCHES]
            assert kept.unique().tolist() == [PATCHES + BESIDE[policy]]
    out = turn(family, torch.cat([IDS, words(4, seed=3)], dim=1), cache, max_new_tokens=12)
    assert out.shape[1] == IDS.shape[1] + 16
    # They stay for good, and so do those of later turns.
    assert {m.min().item() for m in cache.report().kept_media if m is not None} == {PATCHES}
    again = policy.chooser.again
    if again is not None and again.every == 4:
        text = [
            k - m for k, m in zip(cache.report().kept_tokens, cache.report().kept_media, strict=True) if k is not None
        ]
        assert max(int(each.max()) for each in text) < BESIDE[policy] + 4


@pytest.mark.parametrize("policy", [H2O(heavy=4, recent=5), SnapKV(keep=9), StreamingLLM(window=6)], ids=str)
def test_without_media_the_policy_is_as_it_is_by_itself(policy):
    ids = seeing.prompt(30)
    caches = [new_cache("llava", each, evict_every=1) for each in (policy, KeepMedia(policy))]
    assert torch.equal(*(generate("llava", ids, cache) for cache in caches))
    for one, other in zip(*(cache.report().kept_tokens for cache in caches), strict=True):
        assert torch.equal(one, other)


def test_the_report_says_how_much_of_what_is_kept_are_media():
    cache = new_cache("llava", KeepMedia(StreamingLLM(window=3, sinks=1)), evict_every=1)
    generate("llava", IDS, cache, max_new_tokens=1)
    assert re.search(r"of them media +80\.0%", str(cache.report()))
    assert cache.report().to_dict()["kept_media"] == [[[PATCHES] * 2]] * 2
    plain = headwise.HeadwiseCache(shared("llava"), StreamingLLM(window=3, sinks=1))
    generate("llava", IDS, plain, max_new_tokens=1)
    assert plain.report().kept_media == [None, None]
    assert "kept_media" not in plain.report().to_dict()


def test_no_tokenizer_is_needed_for_media(tmp_path):
    cache = headwise.HeadwiseCache(shared("llava"), KeepMedia(SnapKV(keep=6)))
    out = generate("llava", IDS, cache)
    cache.save(tmp_path / "seen.safetensors")
    loaded = headwise.HeadwiseCache.load(tmp_path / "seen.safetensors", shared("llava"), KeepMedia(SnapKV(keep=6)))
    more = torch.cat([out, words(4)], dim=1)
    assert torch.equal(turn("llava", more, loaded), turn("llava", more, copy.deepcopy(cache)))
