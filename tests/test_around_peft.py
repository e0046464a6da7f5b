"""Adapters of PEFT: applied, switched, merged and taken off while a cache lives, or that make a cache of theirs."""

from __future__ import annotations

import gc

import pytest
import torch
from peft import (
    AdaptionPromptConfig,
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import DynamicCache

import headwise
import tiny
from headwise.errors import CacheStateError, InputError, MismatchError, UnsupportedModelError

# What PEFT asks of transformers is going to be renamed; and what it says of a generation with virtual tokens.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
]

IDS = tiny.prompt(30)
TOKENIZER = tiny.tokenizer()
GREEDY = {"max_new_tokens": 5, "do_sample": False}
EVICTS = headwise.H2O(heavy=4, recent=5)
TASK = {"task_type": "CAUSAL_LM"}
VIRTUAL = 5


def lora():
    return LoraConfig(**TASK, r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])


CONFIGS = {
    "lora": lora,
    "ia3": lambda: IA3Config(**TASK, target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "adaption": lambda: AdaptionPromptConfig(**TASK, adapter_len=4, adapter_layers=2),
    "prompt": lambda: PromptTuningConfig(**TASK, num_virtual_tokens=VIRTUAL),
    "encoder": lambda: PromptEncoderConfig(**TASK, num_virtual_tokens=VIRTUAL, encoder_hidden_size=32),
    "prefix": lambda: PrefixTuningConfig(**TASK, num_virtual_tokens=VIRTUAL),
}


def adapted(kind, base=None):
    return randomized(get_peft_model(base or tiny.llama(), CONFIGS[kind]()))


def randomized(model):
    """Adapters begin as ones that change nothing."""
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("lora", "ia3", "adaption", "prompt")):
            parameter.data.normal_(0, 0.3)
    return model.eval()


def generate(model, cache, ids=IDS, **options):
    return model.generate(input_ids=ids, past_key_values=cache, **GREEDY | options)


def two_turns(model, cache):
    ids = generate(model, cache)
    return generate(model, cache, torch.cat([ids, IDS[:, : VIRTUAL + 4]], dim=1))


# Where virtual tokens count as tokens of the prompt, transformers leaves out as many of the second turn.
@pytest.mark.filterwarnings("ignore:.*do not begin with them:headwise.errors.HeadwiseWarning")
@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind != "prefix"])
def test_with_an_adapter_the_ids_are_those_of_stock(kind):
    model = adapted(kind)
    stock = DynamicCache(config=model.config)
    expected = two_turns(model, stock)
    with torch.no_grad():
        forward = model(input_ids=IDS).logits
        assert (forward[:, -1] - tiny.llama()(IDS).logits[:, -1]).abs().amax() > 0.05
    # Made with the model that PEFT made, or with the one inside.
    for made_with in (model, model.get_base_model()):
        cache = headwise.HeadwiseCache(made_with, headwise.Full())
        assert torch.equal(two_turns(model, cache), expected)
        assert cache.get_seq_length() == stock.get_seq_length()
        with torch.no_grad():
            cache = headwise.HeadwiseCache(made_with, headwise.Full())
            # Attention of a prompt is not the sum of the same numbers in the same order as in torch.
            found = model(input_ids=IDS, past_key_values=cache).logits
            torch.testing.assert_close(found, forward, atol=1e-4, rtol=1e-4)
    one, other = (headwise.HeadwiseCache(made_with, EVICTS) for made_with in (model, model.get_base_model()))
    assert torch.equal(two_turns(model, one), two_turns(model, other))
    assert one.report().kept_ratio < 0.6


def test_adapters_may_be_switched_merged_and_disabled_between_turns():
    model = get_peft_model(tiny.llama(), lora(), adapter_name="one")
    model.add_adapter("two", lora())
    randomized(model)

    def turns(cache):
        model.set_adapter("one")
        ids = generate(model, cache)
        model.set_adapter("two")
        ids = generate(model, cache, torch.cat([ids, IDS[:, :3]], dim=1))
        with model.disable_adapter():
            ids = generate(model, cache, torch.cat([ids, IDS[:, :3]], dim=1))
        model.merge_adapter(["one"])
        ids = generate(model, cache, torch.cat([ids, IDS[:, :3]], dim=1))
        model.unmerge_adapter()
        return ids

    expected = turns(DynamicCache(config=model.config))
    assert torch.equal(turns(headwise.HeadwiseCache(model, headwise.Full())), expected)


def test_an_adapter_that_comes_and_goes_leaves_the_cache_at_work():
    base = tiny.llama()
    plain = generate(base, None)
    cache = headwise.HeadwiseCache(base, headwise.Full())
    model = adapted("lora", base)
    assert torch.equal(generate(model, cache), generate(model, None))
    cache.reset()
    assert torch.equal(generate(model.unload(), cache), plain)
    model = adapted("lora", base)
    merged = model.merge_and_unload()
    cache.reset()
    assert torch.equal(generate(merged, cache), generate(merged, None))
    del cache
    assert not base._forward_pre_hooks
    assert not base.model._forward_pre_hooks


def test_a_cache_goes_on_where_its_adapter_is_merged_for_good():
    model = adapted("lora")
    cache, other = (headwise.HeadwiseCache(model, EVICTS) for _ in range(2))
    ids = torch.cat([generate(model, cache), IDS[:, :3]], dim=1)
    generate(model, other)
    expected = generate(model, other, ids)
    merged = model.merge_and_unload()
    del model
    gc.collect()
    assert torch.equal(generate(merged, cache, ids), expected)
    with pytest.raises(MismatchError, match="PeftModelForCausalLM this cache was made for is gone"):
        cache.reset()


def test_a_file_says_which_adapters_were_active(tmp_path):
    path = tmp_path / "cache.safetensors"
    model = get_peft_model(tiny.llama(), lora(), adapter_name="one")
    model.add_adapter("two", lora())
    randomized(model)
    cache = headwise.HeadwiseCache(model, EVICTS)
    generate(model, cache)
    cache.save(path)
    assert headwise.HeadwiseCache.load(path, model, EVICTS).get_seq_length() == 34
    model.set_adapter("two")
    with pytest.raises(MismatchError, match=r"adapters \[one\] active, not with \[two\]"):
        headwise.HeadwiseCache.load(path, model, EVICTS)
    model.set_adapter("one")
    with model.disable_adapter(), pytest.raises(MismatchError, match=r"adapters \[one\] active, not with \[\]"):
        headwise.HeadwiseCache.load(path, model, EVICTS)


# Adapters that are tokens.


def test_a_prefix_that_is_a_cache_of_its_own_is_refused():
    """PEFT would pass over the cache, and the user would believe that it is compressed."""
    model = adapted("prefix")
    with pytest.raises(UnsupportedModelError, match="adapter of type PREFIX_TUNING, for which PEFT makes a cache"):
        headwise.HeadwiseCache(model, EVICTS)


def test_a_model_that_exchanges_the_cache_it_is_given_is_refused():
    model = tiny.llama()
    own = model.prepare_inputs_for_generation
    model.prepare_inputs_for_generation = lambda *args, **kwargs: (
        own(*args, **kwargs) | {"past_key_values": DynamicCache(config=model.config)}
    )
    cache = headwise.HeadwiseCache(model, headwise.Full())
    with pytest.raises(CacheStateError, match="LlamaForCausalLM puts another cache in the place of the one"):
        generate(model, cache)


@pytest.mark.parametrize(
    "policy", [headwise.FastGen(0.6), headwise.KVzip(keep=0.5)], ids=["looks at kinds", "repeats the prompt"]
)
def test_virtual_tokens_have_no_ids(policy):
    """They come as embeddings before those of the prompt, of which ids are known: 30 of 35 tokens."""
    model = adapted("prompt")
    cache = headwise.HeadwiseCache(model, policy, tokenizer=TOKENIZER)
    with pytest.raises(InputError, match="pass input_ids, not inputs_embeds"):
        generate(model, cache)
    cache.reset()
    with torch.no_grad(), pytest.raises(InputError, match=r"matching input_ids|of 35 tokens only 30 have ids"):
        model(input_ids=IDS, past_key_values=cache)
