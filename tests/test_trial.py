"""What a model does with cache and attention is found by its own code; and what hangs on it meanwhile stays its own."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import headwise
import models
import tiny
from headwise.errors import HeadwiseWarning, UnsupportedModelError
from headwise.hosts.transformers import trial
from headwise.hosts.transformers.model_facts import read_facts
from headwise.hosts.transformers.trial import same_but_for_position, try_model

USUAL = models.SMALL | {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 100,
}
GREEDY = {"max_new_tokens": 12, "do_sample": False}


def made(kind, **options):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **USUAL | options)).eval()


def diffllama():
    return made("diffllama", num_hidden_layers=3)


def gemma4():
    layers = ["sliding_attention", "full_attention"] * 2
    options = {"layer_types": layers, "head_dim": 16, "sliding_window": 16, "num_kv_shared_layers": 2}
    further = {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 101}
    return made("gemma4_text", num_hidden_layers=4, **options, **further)


class Passes:
    """Counts them."""

    def __init__(self, decoder):
        self.count = 0
        decoder.register_forward_hook(self._count)

    def _count(self, *_):
        self.count += 1


def test_a_model_is_tried_once():
    model = tiny.llama()
    passes = Passes(model.get_decoder())
    caches = [headwise.HeadwiseCache(model, headwise.Full()) for _ in range(3)]
    # Two more with a cache that keeps all, and two with transformers' own beside them.
    assert passes.count == 1 + 2 + 2
    # What is known of it goes with it.
    decoder = weakref.ref(model.get_decoder())
    assert read_facts(model)[0].layers is read_facts(model)[0].layers
    del model, passes
    assert [cache.get_seq_length() for cache in caches] == [0, 0, 0]
    del caches
    gc.collect()
    assert decoder() is None


@pytest.mark.parametrize("family", models.FAMILIES)
def test_what_is_seen_of_layers_of_the_usual_kind(family):
    model = models.shared(family)
    seen = try_model(model)
    assert sorted(seen) == list(range(models.LAYERS))
    for index, layer in seen.items():
        assert layer.updates == 1
        assert layer.readers == [f"layer {index}"]
        assert layer.obstacle is None
    # A rotation is only believed where it gives the model's own keys.
    assert not same_but_for_position(seen[0], lambda vectors, positions, back: vectors * 1.01)


def test_a_layer_that_computes_attention_twice_is_named():
    """DiffLlama attends with each half of its values; all of its layers do."""
    model = diffllama()
    with pytest.raises(UnsupportedModelError, match="layer 0: its values are changed between cache and attention"):
        headwise.HeadwiseCache(model, headwise.H2O(heavy=4, recent=8))
    # Where nothing is to be dropped, its own layers serve.
    ids = tiny.prompt(43)
    stock, plain = model.generate(ids, **GREEDY), model(ids).logits
    cache = headwise.HeadwiseCache(model, headwise.Full())
    assert torch.equal(model(ids).logits, plain)
    assert torch.equal(model.generate(ids, past_key_values=cache, **GREEDY), stock)


@pytest.mark.parametrize("kind", ["bloom", "falcon"])
def test_a_model_whose_attention_is_its_own_keeps_its_own_cache(kind):
    """Nothing of it may be touched: its masks, say, are made for its own attention alone."""
    sizes = {"n_layer": 2, "n_head": 4} if kind == "bloom" else {"num_hidden_layers": 2}
    model = made(kind, **sizes)
    with pytest.raises(UnsupportedModelError, match="layer 0: its keys do not come from the cache to transformers'"):
        headwise.HeadwiseCache(model, headwise.H2O(heavy=4, recent=8))
    ids, mask = tiny.left_padded(tiny.prompt(13)[0], tiny.prompt(30)[0])
    cache = headwise.HeadwiseCache(model, headwise.Full())
    stock = model.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY), stock)


class Deaf(LlamaForCausalLM):
    """Makes a cache of its own, whatever it is given."""

    def __init__(self, config):
        super().__init__(config)
        forward = self.model.forward
        self.model.forward = lambda input_ids=None, past_key_values=None, **kwargs: forward(
            input_ids=input_ids, past_key_values=DynamicCache(config=config), **kwargs
        )


def test_a_model_that_makes_no_use_of_its_cache_is_refused():
    with pytest.raises(UnsupportedModelError, match="LlamaModel makes no use of the cache that it is given"):
        headwise.HeadwiseCache(Deaf(tiny.llama().config), headwise.Full())


class Peeking(LlamaForCausalLM):
    """Looks into the layers of its cache by itself."""

    def __init__(self, config, add):
        super().__init__(config)
        forward = self.model.forward

        def peeking(input_ids=None, past_key_values=None, **kwargs):
            output = forward(input_ids=input_ids, past_key_values=past_key_values, **kwargs)
            seen = past_key_values.layers[0].keys
            output.last_hidden_state = output.last_hidden_state + add(seen)
            return output

        self.model.forward = peeking


@pytest.mark.parametrize(
    ("add", "said"),
    [
        (lambda keys: keys.sum(), "it raises AttributeError: 'NoneType' object has no attribute 'sum'"),
        (lambda keys: 0 if keys is None else 1, "its output is off by"),
    ],
    ids=["raises", "differs"],
)
def test_a_model_that_looks_into_its_cache_is_refused_when_a_cache_is_made(add, said):
    model = Peeking(tiny.llama().config, add).eval()
    for policy in (headwise.Full(), headwise.H2O(heavy=4, recent=4)):
        with pytest.raises(UnsupportedModelError, match=said):
            headwise.HeadwiseCache(model, policy)


def test_a_model_with_an_attention_function_of_somebodys_own_is_refused():
    """Another took its place in silence; one that computes what all others do may be replaced."""

    def halved(module, query, key, value, attention_mask, **options):
        output, weights = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return output * 0.5, weights

    AttentionInterface.register("halved", halved)
    AttentionMaskInterface.register("halved", sdpa_mask)
    model = tiny.llama()
    model.set_attn_implementation("halved")
    with pytest.raises(UnsupportedModelError, match="its output is off by"):
        headwise.HeadwiseCache(model, headwise.Full())
    model = tiny.llama()
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        headwise.HeadwiseCache(model, headwise.Full())


def test_a_model_that_cannot_read_ids_is_refused_with_what_it_said():
    model = tiny.llama()
    model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(UnsupportedModelError, match="with transformers' own cache: ZeroDivisionError"):
        headwise.HeadwiseCache(model, headwise.Full())


def test_a_trial_leaves_no_trace():
    model, ids = tiny.llama(), tiny.prompt(20)
    plain, state = model(ids).logits, torch.get_rng_state()
    model.train()
    try_model(model)
    model.eval()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model(ids).logits, plain)
    assert trial._trial.get() is None


# Models that let go of their cache.


def longrope():
    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 48}
    scaling = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    options = {"num_hidden_layers": 2, "original_max_position_embeddings": 48, "rope_parameters": rope | scaling}
    return Phi3ForCausalLM(Phi3Config(**USUAL | {"max_position_embeddings": 256} | options)).eval()


@pytest.mark.parametrize("policy", [headwise.Full(), headwise.H2O(heavy=9, recent=9)], ids=str)
def test_where_a_model_reads_all_again_the_cache_begins_again(policy):
    model, ids = longrope(), tiny.prompt(43)
    stock = model.generate(ids, **GREEDY)
    cache = headwise.HeadwiseCache(model, policy)
    with pytest.warns(HeadwiseWarning, match="Phi3ForCausalLM lets go of its cache here and reads all tokens again"):
        mine = model.generate(ids, past_key_values=cache, return_dict_in_generate=True, **GREEDY)
    assert mine.past_key_values is cache
    assert cache.get_seq_length() == mine.sequences.shape[1] - 1
    if policy == headwise.Full():
        assert torch.equal(mine.sequences, stock)
    else:
        # It was read again as one prompt of 49, of which 18 stay.
        assert {int(kept.max()) for kept in cache.report().kept_tokens} <= set(range(18, 18 + 16))


# Copies.


def test_a_copy_of_a_model_knows_nothing_of_the_cache():
    model, ids = tiny.llama(), tiny.prompt(20)
    stock = model.generate(ids, **GREEDY)
    cache = headwise.HeadwiseCache(model, headwise.Full())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.config._attn_implementation == model.config._attn_implementation
        assert torch.equal(other.generate(ids, **GREEDY), stock)
        with pytest.raises(headwise.MismatchError, match="made for a LlamaForCausalLM"):
            other.generate(ids, past_key_values=cache, **GREEDY)
        cache.reset()
        own = headwise.HeadwiseCache(other, headwise.Full())
        assert torch.equal(other.generate(ids, past_key_values=own, **GREEDY), stock)
    assert torch.equal(model.generate(ids, past_key_values=cache, **GREEDY), stock)


def test_models_may_share_a_configuration():
    one = tiny.llama()
    other = LlamaForCausalLM(one.config).eval()
    ids = tiny.prompt(20)
    plain = other(ids).logits
    caches = [headwise.HeadwiseCache(model, headwise.Full()) for model in (one, other)]
    stock = [model.generate(ids, **GREEDY) for model in (one, other)]
    assert torch.equal(other(ids).logits, plain)
    for model, cache, expected in zip((one, other), caches, stock, strict=True):
        assert torch.equal(model.generate(ids, past_key_values=cache, **GREEDY), expected)


def test_what_others_put_in_the_place_of_a_method_stays():
    """As PEFT does while it generates."""
    model, ids, called = tiny.llama(), tiny.prompt(20), []
    own = model.prepare_inputs_for_generation

    def theirs(*args, **kwargs):
        called.append(kwargs["past_key_values"])
        return own(*args, **kwargs)

    model.prepare_inputs_for_generation = theirs
    cache = headwise.HeadwiseCache(model, headwise.Full())
    model.generate(ids, past_key_values=cache, **GREEDY)
    assert called == [cache] * 12
    called.clear()
    del cache
    assert model.prepare_inputs_for_generation is theirs
