"""Models that hold attention and something else: attention is compressed, the rest stays, and both go together."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    FalconH1Config,
    GraniteMoeHybridConfig,
    Lfm2Config,
    LlamaConfig,
    Qwen3NextConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import headwise
import models
import tiny
from headwise.errors import CacheStateError

USUAL = models.SMALL | {
    "pad_token_id": 2,
    "bos_token_id": 0,
    "eos_token_id": None,
}
MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
# Its configuration, and the layers that are compressed.
FAMILIES = {
    "llama": (lambda: LlamaConfig(**USUAL, num_hidden_layers=2), [0, 1]),
    "lfm2": (lambda: Lfm2Config(**USUAL, num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"]), [1]),
    "falcon-h1": (lambda: FalconH1Config(**USUAL, **MAMBA, num_hidden_layers=2, mamba_d_ssm=128), [0, 1]),
    "granite": (
        lambda: GraniteMoeHybridConfig(
            **USUAL, **MAMBA, num_hidden_layers=3, layer_types=["mamba", "attention", "mamba"], num_local_experts=0
        ),
        [1],
    ),
    "qwen3-next": (
        lambda: Qwen3NextConfig(
            **USUAL,
            **EXPERTS,
            **LINEAR,
            head_dim=16,
            shared_expert_intermediate_size=32,
            num_hidden_layers=3,
            layer_types=["linear_attention", "full_attention", "linear_attention"],
        ),
        [1],
    ),
}
HYBRIDS = [family for family in FAMILIES if family != "llama"]
NEW = 14


@functools.cache
def model_of(family):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FAMILIES[family][0]()).eval()


def generate(model, cache, **options):
    return model.generate(tiny.prompt(31), past_key_values=cache, max_new_tokens=NEW, **{"do_sample": False} | options)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}], ids=str)
@pytest.mark.parametrize("family", HYBRIDS)
def test_with_nothing_evicted_the_ids_are_those_of_the_stock_cache(family, options):
    model = model_of(family)
    cache = headwise.HeadwiseCache(model, headwise.Full())
    assert [layer.core.index for layer in cache.headwise_layers] == FAMILIES[family][1]
    assert torch.equal(generate(model, cache, **options), generate(model, None, **options))


SINKS, WINDOW = 2, 9


def windowed(module, query, key, value, attention_mask, **options):
    """Attention where a token after the prompt sees the first few, as many before it as a window has, and itself."""
    if query.shape[2] == 1:
        column = torch.arange(key.shape[2])
        attention_mask = ((column < SINKS) | (column >= key.shape[2] - WINDOW - 1))[None, None, None]
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_eviction_gives_equals_stock_with_a_mask(family):
    model = model_of(family)
    AttentionInterface.register("windowed", windowed)
    AttentionMaskInterface.register("windowed", sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation("windowed")
    try:
        expected = generate(model, None, output_logits=True, return_dict_in_generate=True)
    finally:
        model.set_attn_implementation(before)
    policy = headwise.StreamingLLM(window=WINDOW, sinks=SINKS)
    cache = headwise.HeadwiseCache(model, policy, evict_every=1)
    found = generate(model, cache, output_logits=True, return_dict_in_generate=True)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=1e-4, rtol=1e-4)
    kept = [tokens for tokens in cache.report().kept_tokens if tokens is not None]
    assert len(kept) == len(FAMILIES[family][1])
    assert {int(tokens.max()) for tokens in kept} == {WINDOW + SINKS}


def further(model, cache, ids):
    with torch.no_grad():
        return torch.cat([model(new, past_key_values=cache).logits for new in ids.split(1, dim=1)], dim=1)


@pytest.mark.parametrize("way", ["copy", "file"])
@pytest.mark.parametrize("family", HYBRIDS)
def test_a_copy_has_the_states_too(family, way, tmp_path):
    model, ids = model_of(family), tiny.prompt(50, seed=3)
    policy = headwise.H2O(heavy=6, recent=6)
    cache = headwise.HeadwiseCache(model, policy)
    further(model, cache, ids[:, :1])
    cache.reset()
    with torch.no_grad():
        model(ids[:, :40], past_key_values=cache)
    if way == "copy":
        other = copy.deepcopy(cache)
    else:
        cache.save(tmp_path / "cache.safetensors")
        other = headwise.HeadwiseCache.load(tmp_path / "cache.safetensors", model, policy)
    assert sum(tensor.nbytes for tensor in other.tensors()) == sum(tensor.nbytes for tensor in cache.tensors())
    mine, its = further(model, cache, ids[:, 40:]), further(model, other, ids[:, 40:])
    assert torch.equal(mine, its)


@pytest.mark.parametrize("family", HYBRIDS)
def test_after_a_reset_another_number_of_sequences_can_come(family):
    model = model_of(family)
    cache, fresh = (headwise.HeadwiseCache(model, headwise.Full()) for _ in range(2))
    with torch.no_grad():
        model(tiny.prompt(20, batch=3), past_key_values=cache)
        cache.reset()
        mine, its = (model(tiny.prompt(17, batch=2, seed=1), past_key_values=one).logits for one in (cache, fresh))
    assert torch.equal(mine, its)
    ids = tiny.prompt(4, batch=2, seed=2)
    assert torch.equal(further(model, cache, ids), further(model, fresh, ids))


def test_sequences_are_selected_with_their_states():
    """Falcon-H1 has states beside the attention of a layer; with the stock cache they would stay behind."""
    model, ids = model_of("falcon-h1"), tiny.prompt(24, batch=3, seed=5)
    cache, alone = (headwise.HeadwiseCache(model, headwise.Full()) for _ in range(2))
    with torch.no_grad():
        model(ids, past_key_values=cache)
        model(ids[[2, 2, 1, 1]], past_key_values=alone)
    cache.batch_select_indices(torch.tensor([2, 1]))
    cache.batch_repeat_interleave(2)
    new = tiny.prompt(5, batch=4, seed=6)
    torch.testing.assert_close(further(model, cache, new), further(model, alone, new), atol=1e-5, rtol=1e-5)


def test_tokens_are_not_taken_back_from_a_running_state():
    model = model_of("falcon-h1")
    cache = headwise.HeadwiseCache(model, headwise.Full())
    generate(model, cache)
    assert not cache.is_croppable
    with pytest.raises(CacheStateError, match="cannot remove 3 tokens: layer 0 has a running state"):
        cache.crop(-3)
    assert cache.get_seq_length() == 31 + NEW - 1


@pytest.mark.parametrize("family", HYBRIDS)
def test_a_repetition_of_the_prompt_leaves_the_states_as_they_were(family):
    """A policy that keeps all after it asked the model to repeat its prompt goes on as one that never asked."""
    model, ids = model_of(family), tiny.prompt(40, seed=7)
    logits = []
    for policy in (headwise.KVzip(keep=1.0), headwise.Full()):
        cache = headwise.HeadwiseCache(model, policy, tokenizer=tiny.tokenizer())
        with torch.no_grad():
            model(ids[:, :31], past_key_values=cache)
        assert cache.report().kept_ratio == 1
        logits.append(further(model, cache, ids[:, 31:]))
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


def test_steps_of_hybrid_layers_are_not_captured():
    model = model_of("falcon-h1")
    cache = headwise.HeadwiseCache(model, headwise.Full())
    generate(model, cache)
    with pytest.raises(headwise.UnsupportedModelError, match="every layer's cache is headwise's alone"):
        headwise.DecodeGraph(model, cache, capture=lambda step: step)
