"""Weights that accelerate has put into main memory or on a disk: the same ids, and files that fit the same model."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from transformers import LlamaForCausalLM

import headwise
import models
import tiny
from cases import singly
from headwise.errors import UnsupportedModelError
from headwise.placement import device_of
from headwise.weights import fingerprint, sample_weights

# What the oldest transformers says of weights that are away.
pytestmark = pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")

CPU = torch.device("cpu")
GREEDY = {"max_new_tokens": 6, "do_sample": False}
POLICIES = [
    headwise.Full(),
    headwise.H2O(heavy=5, recent=6),
    headwise.KVzip(keep=0.5),
    # They turn keys by the model's own embedding.
    headwise.ExpectedAttention(keep=0.5),
]
PARTS = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
PARTS |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
WAYS = {
    "memory": lambda model, _: cpu_offload(model, execution_device=CPU, offload_buffers=True),
    "disk": lambda model, folder: disk_offload(model, folder, execution_device=CPU),
    "parts": lambda model, folder: dispatch_model(model, PARTS, main_device="cpu", offload_dir=folder),
}


def generate(model, policy, cache=None):
    cache = cache or headwise.HeadwiseCache(model, policy, tokenizer=tiny.tokenizer())
    return model.generate(tiny.prompt(40), past_key_values=cache, **GREEDY)


@singly(policy=POLICIES, way=list(WAYS))
def test_offloaded_weights_give_the_same_ids(policy, way, tmp_path):
    plain, model = tiny.llama(), tiny.llama()
    expected = plain.generate(tiny.prompt(40), **GREEDY) if policy == headwise.Full() else generate(plain, policy)
    before = headwise.HeadwiseCache(model, policy, tokenizer=tiny.tokenizer())
    WAYS[way](model, tmp_path)
    assert model.lm_head.weight.is_meta
    # What was found out about the model before, and what is found out now.
    assert torch.equal(generate(model, policy, before), expected)
    assert torch.equal(generate(model, policy), expected)
    other = tiny.llama()
    WAYS[way](other, tmp_path)
    assert torch.equal(generate(other, policy), expected)
    assert not any(tensor.is_meta for tensor in before.tensors())


def test_weights_that_come_back_for_good_change_nothing():
    model, policy = tiny.llama(), headwise.H2O(heavy=5, recent=6)
    expected = generate(model, policy)
    cpu_offload(model, execution_device=CPU)
    cache = headwise.HeadwiseCache(model, policy)
    remove_hook_from_submodules(model)
    assert torch.equal(generate(model, policy, cache), expected)


@pytest.mark.parametrize("way", WAYS)
def test_a_cache_is_saved_and_loaded_where_weights_are_away(way, tmp_path):
    """A file of the model in memory fits the same model offloaded, and the other way round."""
    model, policy, ids = tiny.llama(), headwise.H2O(heavy=5, recent=6), tiny.prompt(33)
    plain = headwise.HeadwiseCache(model, policy)
    with torch.no_grad():
        model(ids, past_key_values=plain)
    plain.save(tmp_path / "plain.safetensors")
    away = tiny.llama()
    WAYS[way](away, tmp_path)
    loaded = headwise.HeadwiseCache.load(tmp_path / "plain.safetensors", away, policy)
    loaded.save(tmp_path / "away.safetensors")
    back = headwise.HeadwiseCache.load(tmp_path / "away.safetensors", model, policy)
    with torch.no_grad():
        found = [each(ids[:, :1], past_key_values=cache).logits for each, cache in ((away, loaded), (model, back))]
        expected = model(ids[:, :1], past_key_values=copy.deepcopy(plain)).logits
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], expected)


@pytest.mark.parametrize("way", ["memory", "disk"])
def test_tied_weights_are_known_again(way, tmp_path):
    """Without content they are two where they were one."""
    model, away = models.build("gpt2"), models.build("gpt2")
    WAYS[way](away, tmp_path)
    assert len(list(away.parameters())) > len(list(model.parameters()))
    assert fingerprint(away) == fingerprint(model)
    assert sample_weights(away).keys() == sample_weights(model).keys()
    assert device_of(away) == CPU


def test_a_model_without_weights_is_refused():
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny.llama().config).eval()
    with pytest.raises(UnsupportedModelError, match="LlamaModel has no weights yet: it is on the meta device; load"):
        headwise.HeadwiseCache(model, headwise.Full())
    with pytest.raises(UnsupportedModelError, match=r"lm_head\.weight has no content: .* load the weights"):
        fingerprint(model)
    # Found once, and not remembered against it.
    model = model.to_empty(device="cpu")
    full = tiny.llama()
    model.load_state_dict(full.state_dict())
    model.model.rotary_emb.inv_freq.copy_(full.model.rotary_emb.inv_freq)
    assert torch.equal(generate(model, headwise.Full()), full.generate(tiny.prompt(40), **GREEDY))
