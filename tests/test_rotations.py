"""Every kind of rotary embedding: what headwise turns by is the model's own, and the model is left as it was."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

import headwise
import tiny
from headwise.hosts.transformers.model_facts import read_facts

# Tokens that a model was made for, before its rotation was scaled.
WINDOW = 48
_FROM = {"original_max_position_embeddings": WINDOW}
KINDS = {
    "default": {"rope_type": "default"},
    "part": {"rope_type": "default", "partial_rotary_factor": 0.5},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, **_FROM},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **_FROM},
    "longrope": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [3.0] * 8, **_FROM},
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5},
}
FAMILIES = {"stablelm": None, "gemma3": None}
# Those whose frequencies follow the length.
FOLLOWING = ("dynamic", "longrope")
_USUAL = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 2,
}


def model_of(kind):
    torch.manual_seed(0)
    if kind == "stablelm":
        return StableLmForCausalLM(StableLmConfig(**_USUAL)).eval()
    if kind == "gemma3":
        rope = {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        }
        layers = ["sliding_attention", "full_attention"]
        config = Gemma3TextConfig(
            **_USUAL,
            head_dim=16,
            sliding_window=512,
            layer_types=layers,
            rope_parameters=rope,
            query_pre_attn_scalar=16,
        )
        return Gemma3ForCausalLM(config).eval()
    longest = WINDOW if kind == "dynamic" else 4 * WINDOW
    rope = {"rope_theta": 10_000.0, **KINDS[kind]}
    config = LlamaConfig(**_USUAL, head_dim=16, max_position_embeddings=longest, rope_parameters=rope)
    return LlamaForCausalLM(config).eval()


def keys_before(model, layer):
    """Keys of a layer as they are before they are turned, of the pass that is done within."""
    attention, found = model.model.layers[layer].self_attn, []
    module = getattr(attention, "k_norm", None) or attention.k_proj
    module.register_forward_hook(lambda _, __, output: found.append(output))
    return found


@pytest.mark.parametrize("length", [WINDOW - 8, 2 * WINDOW])
@pytest.mark.parametrize("kind", [*KINDS, *FAMILIES])
def test_keys_are_turned_as_the_model_turns_them_at_any_length(kind, length):
    """From the keys that it projects to those that it gives to a cache, and back."""
    model, positions = model_of(kind), torch.arange(length)[None]
    facts, _ = read_facts(model)
    for index in range(2):
        found, cache = keys_before(model, index), DynamicCache(config=model.config)
        with torch.no_grad():
            model(tiny.prompt(length), past_key_values=cache)
        turned = cache.layers[index].keys
        plain = found[0] if found[0].ndim == 4 else found[0].unflatten(-1, (2, 16)).transpose(1, 2)
        rotation = facts.layers[index].rotation
        assert rotation is not None and not torch.allclose(plain, turned, atol=1e-2)
        torch.testing.assert_close(rotation(plain, positions, False), turned, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(rotation(turned, positions, True), plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("length", [WINDOW - 18, WINDOW - 4, 2 * WINDOW])
@pytest.mark.parametrize(
    "policy",
    [headwise.ExpectedAttention(keep=1.0), headwise.KVzip(keep=1.0), headwise.PeakAttention(keep=1.0)],
    ids=lambda policy: policy.name,
)
@pytest.mark.parametrize("kind", [*FOLLOWING, "yarn", "part"])
@pytest.mark.filterwarnings("ignore:.*lets go of its cache here")
def test_who_keeps_everything_answers_as_if_nobody_had_looked_through_the_rotation(kind, policy, length):
    """Positions to come, and those of a repetition, are beyond what the model has seen, and it must not notice."""
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 2}
    ids, model = tiny.prompt(length), model_of(kind)
    mask = torch.ones_like(ids)
    expected = model_of(kind).generate(ids, attention_mask=mask, **options)
    cache = headwise.HeadwiseCache(model, policy, tokenizer=tiny.tokenizer())
    found = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
    assert found.tolist() == expected.tolist()


def frequencies(model):
    held = {**vars(model.model.rotary_emb), **model.model.rotary_emb._buffers}
    return {name: torch.as_tensor(held[name]).tolist() for name in ("inv_freq", "max_seq_len_cached") if name in held}


@pytest.mark.parametrize("policy", [headwise.ExpectedAttention(keep=0.5), headwise.KVzip(keep=0.5)], ids=str)
@pytest.mark.parametrize("kind", FOLLOWING)
def test_a_prompt_leaves_the_frequencies_where_it_alone_would_have(kind, policy):
    for length in (WINDOW - 8, 2 * WINDOW):
        plain, model = model_of(kind), model_of(kind)
        cache = headwise.HeadwiseCache(model, policy, tokenizer=tiny.tokenizer())
        with torch.no_grad():
            plain(tiny.prompt(length))
            model(tiny.prompt(length), past_key_values=cache)
        assert frequencies(model) == frequencies(plain)
        assert "forward" not in vars(model.model.rotary_emb)


@pytest.mark.parametrize("kind", FOLLOWING)
def test_making_a_cache_does_not_disturb_a_long_conversation(kind):
    model = model_of(kind)
    with torch.no_grad():
        model(tiny.prompt(2 * WINDOW))
    before = frequencies(model)
    headwise.HeadwiseCache(model, headwise.Full())
    assert frequencies(model) == before


@pytest.mark.parametrize("kind", FOLLOWING)
def test_what_is_expected_of_queries_to_come_does_not_depend_on_how_far_one_looks(kind):
    """They are turned as the keys were that are there, though a model that came so far would turn them otherwise."""
    model = model_of(kind)
    layer = read_facts(model)[0].layers[0]
    with torch.no_grad():
        model(tiny.prompt(20))
    one = torch.ones(1, 1, 1, 16)
    near = layer.rotation(one, torch.tensor([[30]]), False)
    both = layer.rotation(one.expand(1, 1, 2, 16), torch.tensor([[30, 4 * WINDOW]]), False)
    torch.testing.assert_close(both[:, :, :1], near)
