"""Caches whose older rows are codes: what they answer, save, take back, and how people ask for them."""

from __future__ import annotations

import copy

import pytest
import torch

import headwise
import tiny
from headwise.errors import ConfigurationError
from headwise.policies.words import parse_policy
from headwise.quant.formats import RowFormat
from headwise.store.row_parts import row_bytes, row_parts


def logits(model, cache, ids, prompt):
    with torch.no_grad():
        model(ids[:, :prompt], past_key_values=cache)
        return torch.cat(
            [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(prompt, ids.shape[1])], 1
        )


@pytest.mark.parametrize(
    "policy", [headwise.Full(), headwise.H2O(heavy=9, recent=9), headwise.SnapKV(keep=15)], ids=str
)
def test_rows_of_8_bits_change_little_and_rows_of_4_more(policy):
    model, ids = tiny.llama(), tiny.prompt(70, seed=5)
    exact = logits(model, headwise.HeadwiseCache(model, policy), ids, 40)
    errors = []
    for bits in (8, 4):
        quantized = headwise.Quantized(policy, bits, recent=4)
        errors.append((logits(model, headwise.HeadwiseCache(model, quantized), ids, 40) - exact).abs().max())
    # Which tokens are heavy can differ where attention is nearly equal.
    assert 0 < errors[0] < 0.1 * exact.abs().max()
    assert errors[0] < errors[1]


def test_a_cache_of_codes_takes_the_bytes_it_says():
    model, ids = tiny.llama(), tiny.prompt(50)
    cache = headwise.HeadwiseCache(model, headwise.Quantized(headwise.Full(), 4, recent=8, sinks=2))
    model(ids, past_key_values=cache)
    heads = 3 * 2
    exact, packed = 10 * (2 * 14 * 4 + 4), 40 * row_bytes(row_parts(14, 14, torch.float32, RowFormat(4, 4)))
    assert cache.report().used_bytes == heads * (exact + packed)
    report = cache.report()
    assert report.kept_ratio == 1
    assert report.format_counts == {"K4V4": heads} and report.to_dict()["formats"] == [[["K4V4"] * 2]] * 3
    assert report.rows_by_format == {"exact": 10 * heads, "K4V4": 40 * heads}
    assert f"K4V4 {40 * heads} of {50 * heads} rows" in " ".join(str(report).split())
    exact = headwise.HeadwiseCache(model, headwise.Full())
    model(ids, past_key_values=exact)
    assert "formats" not in exact.report().to_dict()


def test_exact_rows_can_be_of_another_type_than_the_model():
    model, ids = tiny.llama(), tiny.prompt(60)
    whole = logits(model, headwise.HeadwiseCache(model, headwise.Full()), ids, 40)
    half = headwise.HeadwiseCache(model, headwise.Full(), cache_dtype=torch.float16)
    assert (logits(model, half, ids, 40) - whole).abs().max() < 0.01 * whole.abs().max()
    rows = 3 * 2 * 60
    assert half.report().used_bytes == rows * (2 * 14 * 2 + 4)
    assert half.report().full_bytes == rows * 2 * 14 * 4


@pytest.mark.parametrize("way", ["file", "copy"])
def test_a_saved_cache_of_codes_goes_on_as_it_was(way, tmp_path):
    model, ids = tiny.llama(), tiny.prompt(70, seed=4)
    policy = headwise.Quantized(headwise.H2O(heavy=12, recent=12), 4, recent=4)
    cache = headwise.HeadwiseCache(model, policy)
    logits(model, cache, ids[:, :60], 40)
    if way == "file":
        cache.save(tmp_path / "cache.safetensors")
        other = headwise.HeadwiseCache.load(tmp_path / "cache.safetensors", model, policy)
    else:
        other = copy.deepcopy(cache)
    mine, its = logits(model, cache, ids[:, 60:], 1), logits(model, other, ids[:, 60:], 1)
    assert torch.equal(mine, its)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("removed", [1, 6, 7, 9, 15])
def test_tokens_taken_back_leave_what_there_would_be_without_them(bits, removed):
    """Or they cannot be: once they have pushed older rows into codes, those do not become exact again."""
    model, ids = tiny.llama(), tiny.prompt(80, seed=4)

    def read(count):
        policy = headwise.Quantized(headwise.Full(), bits, recent=4)
        cache = headwise.HeadwiseCache(model, policy, page_size=8)
        logits(model, cache, ids[:, :count], 40)
        return cache

    cache = read(40 + 15)
    if removed > 15 % 8:
        with pytest.raises(headwise.CacheStateError, match=f"cannot remove {removed} tokens: older ones"):
            cache.crop(-removed)
        return
    cache.crop(-removed)
    never = read(40 + 15 - removed)
    assert [rows.tolist() for rows in cache.report().kept_tokens] == [[[55 - removed] * 2]] * 3
    for new in ids[:, 60:76].split(1, dim=1):
        with torch.no_grad():
            mine, its = (model(new, past_key_values=one).logits for one in (cache, never))
        assert torch.equal(mine, its)


def test_a_cache_of_codes_does_not_promise_that_all_can_be_taken_back():
    model = tiny.llama()
    cache = headwise.HeadwiseCache(model, headwise.Quantized(headwise.Full(), 8))
    logits(model, cache, tiny.prompt(9), 8)
    assert not cache.is_croppable


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}, {"prompt_lookup_num_tokens": 2}, {}]
)
def test_generate_works_with_codes(options):
    model = tiny.llama()
    ids, mask = tiny.left_padded(tiny.prompt(40, seed=1)[0], tiny.prompt(23, seed=2)[0])
    if "prompt_lookup_num_tokens" in options:
        ids, mask = ids[:1], mask[:1]
    cache = headwise.HeadwiseCache(model, headwise.Quantized(headwise.Full(), 8, recent=8))
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=30, **options)
    assert out.shape[1] == ids.shape[1] + 30
    assert max(part.pool.longest for layer in cache.headwise_layers for part in layer.core.store.coded) > 20


def test_words_for_bits():
    assert parse_policy("full+int4") == headwise.Quantized(headwise.Full(), 4)
    assert parse_policy("h2o:heavy=3,recent=4+k8v4") == headwise.Quantized(headwise.H2O(heavy=3, recent=4), 8, 4)
    for wrong in ("full+int3", "full+k8", "full+int4=2", "full+int4+int8", "full+"):
        with pytest.raises(ConfigurationError):
            parse_policy(wrong)
