"""What is read of a model: shapes of its layers, rotations by type of layer; and budgets that follow from shapes."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    DynamicCache,
    GlmConfig,
    GlmForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

import headwise
import models
import tiny
from headwise.contract import LayerShape
from headwise.errors import ConfigurationError, HeadwiseWarning, UnsupportedModelError
from headwise.hosts.transformers.model_facts import read_facts
from headwise.policies.budget import with_budget
from headwise.quant.formats import Precision


@pytest.mark.parametrize("family", models.FAMILIES)
def test_shapes_are_those_of_what_a_cache_is_given(family):
    """Keys and values as the model's own cache has them after a pass."""
    model = models.shared(family)
    facts, stock = read_facts(model)
    assert len(facts.layers) == len(stock) == models.LAYERS
    assert [i for i, layer in enumerate(facts.layers) if layer.compressed] == list(models.full_layers(family))
    cache = headwise.HeadwiseCache(model, headwise.Full())
    with torch.no_grad():
        model(input_ids=models.prompt(9), past_key_values=cache)
    for fact, layer in zip(facts.layers, cache.layers, strict=True):
        keys, values = (
            (layer.core.store.rows().keys, layer.core.store.rows().values)
            if fact.compressed
            else (layer.keys, layer.values)
        )
        assert fact.shape == LayerShape(keys.shape[1], keys.shape[-1], values.shape[-1])
    assert facts.token_bytes(torch.float32) == sum(layer.shape.token_bytes(torch.float32) for layer in facts.layers)


def test_where_keys_are_not_turned_the_rotation_leaves_them_as_they_are():
    """As in every other layer here; what looks behind the prompt then sees it as it is."""
    config = SmolLM3Config(**models.SMALL, num_hidden_layers=2, no_rope_layers=[1, 0], pad_token_id=2, bos_token_id=0)
    torch.manual_seed(0)
    model = SmolLM3ForCausalLM(config).eval()
    turned, plain = (layer.rotation for layer in read_facts(model)[0].layers)
    vectors, at = torch.randn(2, 3, 5, turned_width(config)), torch.arange(3, 8).expand(2, -1)
    assert torch.equal(plain(vectors, at, False), vectors) and torch.equal(plain(vectors, at, True), vectors)
    assert not torch.allclose(turned(vectors, at, False), vectors)
    for policy in (headwise.ExpectedAttention(keep=9), headwise.Match(headwise.SnapKV(keep=9, window=4))):
        cache = headwise.HeadwiseCache(model, policy)
        model.generate(models.prompt(30), past_key_values=cache, max_new_tokens=3, eos_token_id=None)
        assert cache.headwise_layers[1].core.store.longest == 9 + 2


def test_where_no_layer_shows_its_positions_none_is_taken_to_have_no_rotation():
    """It may turn keys by what it counts itself, whatever it is told."""
    config = SmolLM3Config(**models.SMALL, num_hidden_layers=2, no_rope_layers=[0, 0], pad_token_id=2, bos_token_id=0)
    model = SmolLM3ForCausalLM(config).eval()
    assert [layer.rotation for layer in read_facts(model)[0].layers] == [None, None]
    with pytest.raises(UnsupportedModelError, match=r"makes positions is not known; take SnapKV.* without it"):
        headwise.HeadwiseCache(model, headwise.Match(headwise.SnapKV(keep=9)))
    for policy in (headwise.ExpectedAttention(9), headwise.AdaKV(9, over="expected-attention")):
        with pytest.raises(UnsupportedModelError, match="turns queries to positions to come"):
            headwise.HeadwiseCache(model, policy)


def turned_width(config):
    return config.hidden_size // config.num_attention_heads


def keys_of_layers(model, ids, before):
    """Keys of every layer, as they come out of the projection or as attention gets them."""
    found = {}
    layers = model.model.layers
    if before:
        handles = [
            layer.self_attn.k_norm.register_forward_hook(lambda *seen, at=at: found.update({at: seen[-1]}))
            for at, layer in enumerate(layers)
        ]
    cache = headwise.HeadwiseCache(model, headwise.Full())
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
    if before:
        for handle in handles:
            handle.remove()
        return found
    return {layer.core.index: layer.core.store.rows().keys for layer in cache.headwise_layers}


def test_a_rotation_is_that_of_its_type_of_layer():
    """Gemma 3 turns keys of windows and of full attention differently; back at position 0 both are as projected."""
    model, ids = models.shared("gemma3"), models.prompt(24)
    facts, _ = read_facts(model)
    turned, plain = keys_of_layers(model, ids, before=False), keys_of_layers(model, ids, before=True)
    positions = torch.arange(24)[None]
    for index in models.full_layers("gemma3"):
        rotation = facts.layers[index].rotation
        assert rotation is not None
        torch.testing.assert_close(rotation(turned[index], positions, True), plain[index].view_as(turned[index]))
        torch.testing.assert_close(rotation(plain[index].view_as(turned[index]), positions, False), turned[index])
    sliding, full = facts.layers[0].rotation, facts.layers[1].rotation
    one = torch.ones(1, 1, 1, 16)
    far = torch.tensor([[200]])
    assert not torch.allclose(sliding(one, far, False), full(one, far, False))


PARTIAL = {
    "phi": (PhiForCausalLM, PhiConfig, {"num_key_value_heads": 2}),
    "neox": (GPTNeoXForCausalLM, GPTNeoXConfig, {}),
    "glm": (GlmForCausalLM, GlmConfig, {"num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}),
}


@pytest.mark.parametrize("family", PARTIAL)
def test_where_positions_are_in_a_part_of_a_head_the_rest_stays(family):
    """Keys of one token at several positions are the same, turned: by the model at them, and by headwise to them."""
    model_class, config, options = PARTIAL[family]
    usual = {"vocab_size": 101, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = model_class(config(**usual, num_attention_heads=4, initializer_range=0.2, **options)).eval()
    positions = torch.tensor([[0], [1], [7], [30]])
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.full((4, 1), 31), position_ids=positions, past_key_values=cache)
    facts, _ = read_facts(model)
    for layer, fact in zip(cache.layers, facts.layers, strict=True):
        still = layer.keys[:1].expand_as(layer.keys)
        assert fact.rotation is not None and not torch.allclose(layer.keys, still, atol=1e-3)
        torch.testing.assert_close(fact.rotation(still, positions, False), layer.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(fact.rotation(layer.keys, positions, True), still, atol=1e-4, rtol=1e-4)
    for policy in (
        headwise.ExpectedAttention(keep=0.5, future=9),
        headwise.SnapKV(keep=0.5),
        headwise.KeyDiff(keep=0.5),
    ):
        cache = headwise.HeadwiseCache(model, policy)
        model.generate(tiny.prompt(60), past_key_values=cache, max_new_tokens=4, do_sample=False)
        assert cache.report().kept_ratio < 0.7


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt-oss"])
def test_a_budget_of_bytes_is_for_the_layers_that_are_compressed(family):
    """16 KiB are used but for what is less than a token; stock layers have bytes of their own."""
    model, ids = models.shared(family), models.prompt(400)
    cache = headwise.HeadwiseCache(model, headwise.SnapKV(keep=1, window=8), budget="16KiB")
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
    used = sum(layer.core.store.used_bytes for layer in cache.headwise_layers)
    token = len(cache.headwise_layers) * 2 * (2 * 16 * 4 + 4)
    assert 16 * 1024 - token < used <= 16 * 1024


def test_layers_of_different_shapes_share_a_budget():
    """2 heads of 8 + 8 numbers and 1 of 4 + 12, each row with 4 bytes of column: 2 * 68 + 68 bytes a token."""
    layers = [LayerShape(2, 8, 8), LayerShape(1, 4, 12)]
    assert with_budget(headwise.KeyNorm(keep=1), "1KiB", layers, torch.float32).keep == 1024 // 204
    # With a score, 4 bytes more in each of three heads.
    policy = with_budget(headwise.H2O(2, 2), "1KiB", layers, torch.float32)
    assert policy.heavy + policy.recent == 1024 // 216
    with pytest.raises(ConfigurationError, match="less than one token"):
        with_budget(headwise.KeyNorm(keep=1), "203B", layers, torch.float32)
    with pytest.raises(ConfigurationError, match="no layer"):
        with_budget(headwise.KeyNorm(keep=1), "1KiB", [], torch.float32)
    # 20 rows stay exact; of the others each takes 8 + 4 + 8 + 4 + 4 in two heads, and 4 + 4 + 12 + 4 + 4 in one.
    coded = with_budget(headwise.Quantized(headwise.KeyNorm(keep=1), 8), "8KiB", layers, torch.float32)
    assert coded.policy.keep == 20 + (8192 - 20 * 204) // (2 * 28 + 28)


def test_kernels_that_cannot_read_codes_are_refused_when_the_cache_is_made(monkeypatch):
    monkeypatch.setattr("headwise.quant.formats.BITS", (2, 4, 8))
    policy = headwise.Quantized(headwise.Full(), 2)
    assert isinstance(policy.precision, Precision)
    model = tiny.llama()
    with pytest.raises(
        ConfigurationError, match="'cpu' kernels cannot run on cpu: they read codes of 4 or 8 bits, not of 2"
    ):
        headwise.HeadwiseCache(model, policy, kernel="cpu")
    with pytest.warns(HeadwiseWarning, match="plain torch kernels.*not of 2"):
        assert headwise.HeadwiseCache(model, policy).kernel == "reference"
