"""Keys and values with a large part in common, as biases make them: where few bits would drown the rest, it gets 8."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import headwise
import tiny
from headwise.policies.window import Window

# Of 14 channels 6 and 13 turn slowest, so that what they have in common keeps its size at every position; 0 and 7
# turn fastest.
SLOW, FAST, VALUES = (6, 13), (0, 7), (2,)


def biased(size, *, channels=SLOW, projection="k_proj", heads=(0, 1)):
    """A model whose keys or values have that size in some channels of some heads, and hardly turn with it."""
    model = tiny.llama(layers=2)
    for layer in model.model.layers:
        bias = torch.zeros(2, 14)
        for head in heads:
            bias[head, list(channels)] = float(size)
        getattr(layer.self_attn, projection).bias = nn.Parameter(bias.flatten(), requires_grad=False)
    return model


def following(model, cache, ids, prompt=60):
    with torch.no_grad():
        model(ids[:, :prompt], past_key_values=cache)
        steps = [model(new, past_key_values=cache).logits for new in ids[:, prompt:].split(1, dim=1)]
    return torch.cat(steps, dim=1).log_softmax(-1)


def divergence(exact, other):
    return float((exact.exp() * (exact - other)).sum(-1).mean())


def formats_of(cache):
    return {tuple(names) for layer in cache.report().formats for names in layer.tolist()}


IDS = tiny.prompt(100, seed=5)
# Of such random models, with 4 bits that nothing disturbs, 0.1; with 4 bits beside these biases, more than 1.
LITTLE = 0.25


@pytest.mark.parametrize(
    "policy", [headwise.Full(), headwise.H2O(heavy=20, recent=20), headwise.KeyNorm(keep=30)], ids=str
)
@pytest.mark.parametrize(
    ("size", "channels", "format"),
    [(30, SLOW, "K8V4"), (3000, SLOW, "exact"), (100, FAST, "K8V4")],
    ids=["slow", "slow-and-huge", "fast"],
)
def test_what_would_drown_beside_a_bias_gets_more_bits_and_this_is_said(policy, size, channels, format):
    model = biased(size, channels=channels)
    exact = following(model, headwise.HeadwiseCache(model, policy), IDS)
    cache = headwise.HeadwiseCache(model, headwise.Quantized(policy, 4, recent=4))
    with pytest.warns(headwise.HeadwiseWarning, match=r"rounded to K4V4, some heads .* report\(\).formats says which"):
        found = following(model, cache, IDS)
    assert formats_of(cache) == {(format, format)}
    assert divergence(exact, found) < LITTLE


@pytest.mark.parametrize("bits", [4, 8])
def test_without_a_bias_all_get_the_bits_that_were_asked_for(bits):
    model = biased(0)
    cache = headwise.HeadwiseCache(model, headwise.Quantized(headwise.Full(), bits, recent=4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        following(model, cache, IDS)
    assert formats_of(cache) == {(f"K{bits}V{bits}",) * 2}


def test_bits_that_suffice_are_left_as_they_are():
    """A bias that 8 bits bear."""
    model = biased(30)
    cache = headwise.HeadwiseCache(model, headwise.Quantized(headwise.Full(), 8, recent=4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        following(model, cache, IDS)
    assert formats_of(cache) == {("K8V8", "K8V8")}


@pytest.mark.parametrize(("projection", "format"), [("k_proj", "K8V4"), ("v_proj", "K4V8")])
def test_only_the_head_that_has_it_gets_more_and_only_where_it_has_it(projection, format):
    model = biased(
        60 if projection == "k_proj" else 300,
        projection=projection,
        channels=SLOW if projection == "k_proj" else VALUES,
        heads=(1,),
    )
    cache = headwise.HeadwiseCache(model, headwise.Quantized(headwise.Full(), 4, recent=4))
    with pytest.warns(headwise.HeadwiseWarning, match="rounded to K4V4"):
        following(model, cache, IDS)
    # What values have in common goes on to the next layer, and into all of its heads.
    layer = cache.report().formats[0]
    assert layer.tolist() == [["K4V4", format]]


@pytest.mark.parametrize("options", [{"prompt_tokens": 60}, {"kernel": "reference"}, {"page_size": 4}], ids=str)
def test_a_prompt_in_parts_and_other_kernels_are_judged_alike(options):
    model = biased(30)
    exact = following(model, headwise.HeadwiseCache(model, headwise.Full()), IDS)
    cache = headwise.HeadwiseCache(model, headwise.Quantized(headwise.Full(), 4, recent=4), **options)
    first = 40 if "prompt_tokens" in options else 0
    with torch.no_grad():
        for part in IDS[:, :first].split(17, dim=1) if first else ():
            model(part, past_key_values=cache)
    with pytest.warns(headwise.HeadwiseWarning, match="rounded to K4V4"):
        found = following(model, cache, IDS[:, first:], 60 - first)
    assert formats_of(cache) == {("K8V4", "K8V4")}
    assert divergence(exact, found) < LITTLE


@pytest.mark.filterwarnings("ignore:rounded to K4V4")
@pytest.mark.parametrize("way", ["file", "copy"])
def test_a_saved_cache_keeps_who_got_more(way, tmp_path):
    model = biased(60, heads=(1,))
    policy = headwise.Quantized(headwise.H2O(heavy=20, recent=20), 4, recent=4)
    cache = headwise.HeadwiseCache(model, policy)
    following(model, cache, IDS[:, :80])
    if way == "file":
        cache.save(tmp_path / "cache.safetensors")
        other = headwise.HeadwiseCache.load(tmp_path / "cache.safetensors", model, policy)
    else:
        other = copy.deepcopy(cache)
    assert formats_of(other) == formats_of(cache) == {("K4V4", "K8V4")}
    assert other.report().used_bytes == cache.report().used_bytes
    mine, its = (following(model, each, IDS[:, 80:], 1) for each in (cache, other))
    assert torch.equal(mine, its)


@pytest.mark.filterwarnings("ignore:rounded to K4V4")
def test_a_sequence_is_judged_alone():
    """Whatever stands beside it, and however far it is padded."""
    model = biased(12, heads=(1,))
    policy = headwise.Quantized(Window(40), 4, recent=4)
    prompts = [tiny.prompt(70, seed=1)[0], tiny.prompt(45, seed=2)[0]]
    ids, mask = tiny.left_padded(*prompts)
    together = headwise.HeadwiseCache(model, policy)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        model(ids, attention_mask=mask, position_ids=positions, past_key_values=together)
    for row, prompt in enumerate(prompts):
        alone = headwise.HeadwiseCache(model, policy)
        with torch.no_grad():
            model(prompt[None], past_key_values=alone)
        for one, both in zip(alone.report().formats, together.report().formats, strict=True):
            assert one[0].tolist() == both[row].tolist()


@pytest.mark.parametrize(
    ("size", "later_bits", "damaged"), [(30, 4, True), (3000, 8, True), (30, 8, False), (0, 4, False)]
)
def test_later_rows_stay_exact_where_auto_would_damage_them(size, later_bits, damaged):
    """It weighs the prompt's rows by what rounding does to them; of later ones it is told the bits."""
    model = biased(size)
    policy = headwise.Auto(ratio=0.5, window=16, recent=4, later_bits=later_bits, of="prompt")
    cache = headwise.HeadwiseCache(model, policy, tokenizer=tiny.tokenizer())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        following(model, cache, IDS[:, :61])
    said = [str(each.message) for each in told if issubclass(each.category, headwise.HeadwiseWarning)]
    assert bool(said) == damaged
    assert all("rows that come after the prompt stay exact there" in each for each in said)
    following(model, cache, IDS[:, 61:], 1)
    exact = [
        bool((rows.columns[0, h][rows.keep[0, h] & (formats == -1)] == 65).any())
        for rows, formats in (
            (s.rows(), s.row_formats()) for s in (layer.core.store for layer in cache.headwise_layers)
        )
        for h in range(rows.keep.shape[1])
    ]
    assert any(exact) == damaged


def test_a_text_that_repeats_one_token_is_rounded_as_any_other():
    """Its values are all the same: there is nothing to tell apart, and nothing is lost."""
    model = tiny.llama(layers=2, heads=4, kv_heads=2, head_dim=8)
    cache = headwise.HeadwiseCache(model, headwise.Quantized(headwise.Full(), 8))
    with torch.no_grad():
        model(torch.full((1, 80), 9), past_key_values=cache)
    assert {int(each) for layer in cache.headwise_layers for each in layer.core.store.formats.flatten()} == {0}
