"""What is asked of a pass beside its logits, who else looks on, and what a plain pass of the model gives meanwhile."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM

import headwise
import models
import tiny
from contract import decoder_layers
from headwise.errors import CacheStateError, ConfigurationError, InputError

IDS = tiny.prompt(30)
GREEDY = {"max_new_tokens": 5, "do_sample": False}
EVICTS = headwise.H2O(heavy=4, recent=5)
FAMILIES = ["llama", "gemma3", "gpt2"]


def generate(model, cache, ids=IDS, **options):
    return model.generate(ids, past_key_values=cache, **GREEDY | options)


# What a pass returns.


@pytest.mark.parametrize("before", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_weights_are_refused_before_anything_is_read(family, before):
    """An empty tuple came back, where the model would have returned the weights."""
    model = models.build(family)
    model.set_attn_implementation(before)
    cache = headwise.HeadwiseCache(model, EVICTS)
    mask = torch.ones_like(IDS)
    asks = [
        lambda: generate(model, cache, output_attentions=True, return_dict_in_generate=True, attention_mask=mask),
        lambda: model(IDS, past_key_values=cache, output_attentions=True, attention_mask=mask),
        lambda: model.get_decoder()(input_ids=IDS, past_key_values=cache, output_attentions=True),
    ]
    if before == "eager":
        model.config.output_attentions = True
        asks.append(lambda: model(IDS, past_key_values=cache))
    for ask in asks:
        with pytest.raises(ConfigurationError, match=r"output_attentions=True: .* transformers' own cache"):
            ask()
    assert cache.get_seq_length() == 0
    assert model.config._attn_implementation == before
    if before == "eager":
        assert len(model(IDS, past_key_values=DynamicCache(config=model.config)).attentions) == models.LAYERS
        model.config.output_attentions = False
    assert generate(model, cache, attention_mask=mask).shape == (1, 35)


def test_a_model_whose_attention_is_all_its_own_gives_its_weights():
    model = models.build(models.ALL_SLIDING)
    cache = headwise.HeadwiseCache(model, headwise.Full())
    with torch.no_grad():
        mine, stock = (
            model(IDS, past_key_values=each, output_attentions=True).attentions
            for each in (cache, DynamicCache(config=model.config))
        )
    assert len(mine) == models.LAYERS
    assert all(torch.equal(one, other) for one, other in zip(mine, stock, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_logits_and_scores_are_those_of_stock(family):
    model = models.shared(family)
    wanted = {"output_hidden_states": True, "output_logits": True, "output_scores": True}
    cache = headwise.HeadwiseCache(model, headwise.Full())
    options = wanted | {"return_dict_in_generate": True, "attention_mask": torch.ones_like(IDS)}
    mine, stock = generate(model, cache, **options), generate(model, None, **options)
    assert mine.past_key_values is cache
    assert torch.equal(mine.sequences, stock.sequences)
    assert [len(step) for step in mine.hidden_states] == [models.LAYERS + 1] * 5
    for name in ("hidden_states", "logits", "scores"):
        torch.testing.assert_close(getattr(mine, name), getattr(stock, name), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("count", [20, 34])
def test_a_prompt_that_has_nothing_new_for_the_cache_is_refused(count):
    """As where a pipeline is given two prompts and one cache; some other part of the prompt was read in silence."""
    model = tiny.llama()
    cache = headwise.HeadwiseCache(model, headwise.Full())
    first = generate(model, cache)
    with pytest.raises(InputError, match=f"the cache has seen 34 tokens, and generate\\(\\) was given {count}"):
        generate(model, cache, tiny.prompt(count, seed=9))
    # The first prompt goes on as if nothing had been.
    assert torch.equal(generate(model, cache, first), generate(model, None, first))


# Who looks on.


class Onlooker:
    """Hooks of all kinds on every module of a model, which count, and change what decoder layers return."""

    def __init__(self, model):
        self.calls = []
        self.handles = []
        layers = decoder_layers(model)
        for module in (model, model.get_decoder(), *layers, *(layer.self_attn for layer in layers)):
            name = type(module).__name__
            self.handles += [
                module.register_forward_pre_hook(lambda *_, name=name: self.calls.append(("before", name))),
                module.register_forward_hook(lambda *_, name=name: self.calls.append(("after", name))),
            ]
            # What others return is no tensor, and torch warns of that.
            if name in ("LlamaDecoderLayer", "LlamaAttention"):
                back = module.register_full_backward_hook(lambda *_, name=name: self.calls.append(("back", name)))
                self.handles.append(back)
        self.handles.append(layers[1].register_forward_hook(lambda module, args, output: output.flip(-1)))

    def remove(self):
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("first", ["hooks", "cache"])
def test_hooks_of_others_see_and_change_what_they_do_with_stock(first):
    model = tiny.llama()
    plain = generate(model, None)
    onlooker = Onlooker(model)
    expected, calls = generate(model, DynamicCache(config=model.config)), list(onlooker.calls)
    assert not torch.equal(expected, plain)
    if first == "cache":
        onlooker.remove()
        cache = headwise.HeadwiseCache(model, headwise.Full())
        onlooker = Onlooker(model)
    else:
        cache = headwise.HeadwiseCache(model, headwise.Full())
    onlooker.calls.clear()
    assert torch.equal(generate(model, cache), expected)
    assert onlooker.calls == calls
    # Taken off while it lives, and again the cache before the last hook.
    onlooker.remove()
    cache.reset()
    assert torch.equal(generate(model, cache), plain)
    onlooker = Onlooker(model)
    del cache
    onlooker.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(generate(model, None), plain)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_backward_hooks_do_not_hide_that_gradients_are_refused():
    model = tiny.llama()
    onlooker = Onlooker(model)
    cache = headwise.HeadwiseCache(model, headwise.Full())
    output = model(IDS, past_key_values=cache)
    with pytest.raises(CacheStateError, match="gradients do not pass"):
        output.logits.sum().backward()
    onlooker.calls.clear()
    model(IDS).logits.sum().backward()
    assert len([name for kind, name in onlooker.calls if kind == "back"]) == 3 + 3


# Plain passes meanwhile.


class Broken(Exception):
    pass


@pytest.mark.parametrize("before", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_plain_passes_are_bit_for_bit_what_they_were(family, before):
    model = models.build(family)
    model.set_attn_implementation(before)
    ids, mask = models.padded_pair()

    def plain():
        with torch.no_grad():
            stock = DynamicCache(config=model.config)
            first = model(ids, attention_mask=mask, past_key_values=stock).logits
            return [first, model(ids[:, :1], past_key_values=stock).logits, model(ids, use_cache=False).logits]

    def step():
        with torch.no_grad():
            model(ids[:, :1], attention_mask=torch.nn.functional.pad(mask, (0, 1), value=1), past_key_values=cache)

    def unchanged():
        return all(torch.equal(one, other) for one, other in zip(plain(), expected, strict=True))

    expected = plain()
    cache = headwise.HeadwiseCache(model, EVICTS)
    assert unchanged()
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    assert unchanged()

    def fail(*_):
        raise Broken

    handle = decoder_layers(model)[1].register_forward_hook(fail)
    with pytest.raises(Broken):
        step()
    handle.remove()
    assert unchanged()
    with pytest.raises(CacheStateError, match="broken off"):
        step()
    assert unchanged()
    cache.reset()
    del cache
    assert unchanged()


def test_a_plain_pass_inside_a_pass_of_ours_is_its_own():
    """A hook that asks another model, or the same one, and models that share a configuration."""
    model, other = tiny.llama(), None
    other = LlamaForCausalLM(model.config).eval()
    plain = [each(IDS).logits.detach() for each in (model, other)]
    stock = generate(model, None)
    cache, found = headwise.HeadwiseCache(model, headwise.Full()), []

    def ask(module, args, output):
        handle.remove()
        found.extend(each(IDS).logits.detach() for each in (model, other))

    handle = model.model.layers[1].register_forward_hook(ask)
    assert torch.equal(generate(model, cache), stock)
    for mine, expected in zip(found, plain, strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)
