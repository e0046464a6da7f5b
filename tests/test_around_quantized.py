"""Weights that are codes: the same ids as stock, and files that know which model they belong to."""

from __future__ import annotations

import pytest
import torch
from torch.ao.quantization import quantize_dynamic
from transformers import DynamicCache

import headwise
import tiny
from coded_weights import with_int8_weights
from headwise.errors import MismatchError
from headwise.weights import fingerprint, sample_weights

# torch's own way is going to be torchao's.
pytestmark = [
    pytest.mark.filterwarnings("ignore:(?s).*torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning"),
]

GREEDY = {"max_new_tokens": 8, "do_sample": False}
POLICIES = [
    headwise.H2O(heavy=5, recent=6),
    headwise.ExpectedAttention(keep=0.5),
    headwise.KVzip(keep=0.5),
]


WAYS = {
    "weights": with_int8_weights,
    # Its layers have no parameters, and their weights are in what is saved of them.
    "packed": lambda model: quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8),
}


class FloatLinear(torch.nn.Module):
    """Multiplies with what codes stand for."""

    def __init__(self, linear):
        super().__init__()
        self.weight = torch.nn.Parameter(linear.weight.dequantize().detach())

    def forward(self, hidden):
        return hidden @ self.weight.T


def test_with_quantized_weights_the_ids_are_those_of_stock():
    model, ids = WAYS["weights"](tiny.llama()), tiny.prompt(40)
    stock = model.generate(ids, **GREEDY)
    cache = headwise.HeadwiseCache(model, headwise.Full())
    assert torch.equal(model.generate(ids, past_key_values=cache, **GREEDY), stock)


@pytest.mark.parametrize("way", WAYS)
def test_with_quantized_weights_the_logits_are_those_of_stock(way):
    """Where activations are rounded too, the last bit of attention may become a step of a code."""
    model, ids = WAYS[way](tiny.llama()), tiny.prompt(40)
    found = []
    for cache in (headwise.HeadwiseCache(model, headwise.Full()), DynamicCache(config=model.config)):
        with torch.no_grad():
            steps = [ids[:, :31], *ids[:, 31:].split(1, dim=1)]
            found.append(torch.cat([model(step, past_key_values=cache).logits for step in steps], dim=1))
    mine, stock = found
    assert (mine - stock).norm() < (1e-5 if way == "weights" else 0.03) * stock.norm()


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_policies_choose_as_with_the_numbers_that_codes_stand_for(policy):
    model = WAYS["weights"](tiny.llama())
    plain = WAYS["weights"](tiny.llama())
    for module in list(plain.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Linear):
                setattr(module, name, FloatLinear(child))
    found = []
    for each in (model, plain):
        cache = headwise.HeadwiseCache(each, policy, tokenizer=tiny.tokenizer())
        with torch.no_grad():
            first = each(tiny.prompt(40), past_key_values=cache).logits
            found.append((first, each(tiny.prompt(1), past_key_values=cache).logits, cache.report().kept_tokens))
    torch.testing.assert_close(*found, atol=1e-3, rtol=1e-3)
    assert int(found[0][2][0].sum()) < 2 * 30


@pytest.mark.parametrize("way", WAYS)
def test_a_file_fits_the_model_with_the_same_codes_and_no_other(way, tmp_path):
    path, policy = tmp_path / "cache.safetensors", headwise.H2O(heavy=5, recent=6)
    model, ids = WAYS[way](tiny.llama()), tiny.prompt(40)
    cache = headwise.HeadwiseCache(model, policy)
    model.generate(ids, past_key_values=cache, **GREEDY)
    cache.save(path)
    assert headwise.HeadwiseCache.load(path, WAYS[way](tiny.llama()), policy).get_seq_length() == 47
    # Further trained where weights became codes, and nowhere else.
    other = tiny.llama()
    other.model.layers[1].self_attn.q_proj.weight.data += 0.5 * torch.randn(84, 84)
    for another in (WAYS[way](other), tiny.llama()):
        with pytest.raises(MismatchError, match="saved with another LlamaForCausalLM"):
            headwise.HeadwiseCache.load(path, another, policy)


def test_what_was_trained_for_a_model_knows_it_by_what_its_codes_stand_for():
    plain, quantized = (sample_weights(model) for model in (tiny.llama(), WAYS["weights"](tiny.llama())))
    assert plain.keys() == quantized.keys()
    for name, sample in plain.items():
        torch.testing.assert_close(quantized[name], sample, atol=0.01, rtol=0.01)


def test_what_a_model_saves_beside_parameters_is_part_of_what_it_is():
    one, other = tiny.llama(), tiny.llama()
    assert fingerprint(one) == fingerprint(other)
    one.model.register_buffer("codes", torch.arange(9))
    other.model.register_buffer("codes", torch.arange(9).flip(0))
    assert len({fingerprint(model) for model in (one, other, tiny.llama())}) == 3
