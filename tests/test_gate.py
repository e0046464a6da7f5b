"""Gates: what they see and predict, and policies that ask them instead of repeating the prompt."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import headwise
import models
import tiny
from gated import gates_for
from headwise.errors import ConfigurationError, InputError, MismatchError
from headwise.gate.checkpoint import load_gates, save_gates, shipped_gates
from headwise.gate.inputs import PLACE, gate_inputs
from headwise.policies.checks import check_gate
from headwise.policies.words import parse_policy
from oracle import rows_of

TOKENS = 47


@pytest.fixture(scope="module")
def model():
    return tiny.llama(layers=3)


@pytest.fixture(scope="module")
def gates(model):
    return gates_for(model)


@pytest.fixture(scope="module")
def folder(gates, tmp_path_factory):
    path = tmp_path_factory.mktemp("gates") / "deep"
    save_gates(gates, path)
    return str(path)


def read(model, policy, ids, mask=None, pieces=None):
    cache = headwise.HeadwiseCache(model, policy, prompt_tokens=ids.shape[1] if pieces else None)
    real = torch.ones_like(ids) if mask is None else mask
    at = (real.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        for part in torch.arange(ids.shape[1]).split(pieces or ids.shape[1]):
            shown = None if mask is None else mask[:, : part[-1] + 1]
            model(input_ids=ids[:, part], attention_mask=shown, position_ids=at[:, part], past_key_values=cache)
    return cache


def kept(cache):
    return [rows_of(layer.core) for layer in cache.headwise_layers]


def predicted(model, gates, ids):
    """By layer, in double precision: the scores, from keys before their rotation."""
    keys, handles = [], []
    for layer in model.model.layers:
        handles.append(layer.self_attn.k_proj.register_forward_hook(lambda *seen: keys.append(seen[-1])))
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    found, count = [], ids.shape[1]
    for index, rows in enumerate(keys):
        gate = {name: weight.double() for name, weight in gates.layers[index].tensors().items()}
        scores = []
        for at in range(count):
            place = [math.log(at + 1), math.log(count - at), at / count, math.log(count)]
            x = torch.cat([rows[0, at].double(), torch.tensor(place).double()])
            hidden = ((x - gate["mean"]) / gate["scale"]) @ gate["into"] + gate["bias"]
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
            scores.append(hidden @ gate["out"] + gate["level"])
        found.append(torch.stack(scores, dim=1).exp().clamp(max=1))
    return found


def best(scores, quota, sinks, window=0):
    """What a whole model keeps of so many tokens per head."""
    everything = [
        (math.inf if at < sinks else 1e9 + at if at >= head.shape[0] - window else float(head[at]), layer, h, at)
        for layer, heads in enumerate(scores)
        for h, head in enumerate(heads)
        for at in range(head.shape[0])
    ]
    everything.sort(key=lambda one: -one[0])
    chosen = [[set() for _ in heads] for heads in scores]
    for _, layer, h, at in everything[: quota * sum(len(heads) for heads in scores)]:
        chosen[layer][h].add(at)
    return chosen


def test_kvzip_keeps_what_its_gate_finds_best(model, gates, folder):
    ids = tiny.prompt(TOKENS, seed=1)
    found = kept(read(model, headwise.KVzip(12, gate=folder), ids))
    assert [layer[0] for layer in found] == best(predicted(model, gates, ids), 12, sinks=4)
    assert found != kept(read(model, headwise.KVzip(12, gate=folder, sinks=1), ids))


def test_peak_attention_takes_the_larger_of_prediction_and_window(model, gates, folder):
    ids = tiny.prompt(TOKENS, seed=2)
    cache = headwise.HeadwiseCache(model, headwise.Full())
    seen = {}
    for index, layer in enumerate(cache.headwise_layers):
        layer.core.prompt.add = lambda last, mask, at=index: seen.update({at: (last.query, last.keys)})
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
    scores = []
    for index, found in enumerate(predicted(model, gates, ids)):
        query, keys = seen[index]
        weights = torch.einsum("hgqd,htd->hgqt", query[0].double(), keys[0].double()) * query.shape[-1] ** -0.5
        weights = weights.masked_fill(torch.ones(TOKENS, TOKENS).triu(1).bool(), -torch.inf).softmax(-1)
        scores.append(found.maximum(weights[:, :, -5:].amax(dim=(1, 2))))
    policy = headwise.PeakAttention(keep=15, window=5, gate=folder)
    assert [layer[0] for layer in kept(read(model, policy, ids))] == best(scores, 15, sinks=4, window=5)
    plain = list(scores)
    policy = headwise.PeakAttention(0.8, window=5, gate=folder)
    always = {*range(4), *range(TOKENS - 5, TOKENS)}
    expected = [[{at for at in range(TOKENS) if head[at] >= 0.2} | always for head in heads] for heads in scores]
    assert [layer[0] for layer in kept(read(model, policy, ids))] == expected
    assert any(len(head) > len(always) for layer in expected for head in layer)
    # Where rows are mended by queries that are asked behind the prompt, what these look at counts too, here four times.
    length = torch.tensor([TOKENS])
    positions = torch.arange(TOKENS)[None]
    for layer, (index, (query, keys)) in zip(cache.headwise_layers, seen.items(), strict=True):
        rotation = layer.core.config.rotation
        turned = rotation(query.flatten(1, 2), positions, True)
        turned = rotation(turned, length + positions % 256, False).view(query.shape)
        weights = torch.einsum("hgqd,htd->hgqt", turned[0].double(), keys[0].double()) * query.shape[-1] ** -0.5
        scores[index] = plain[index].maximum(4 * weights.softmax(-1).amax(dim=(1, 2)))
    policy = headwise.Match(headwise.PeakAttention(keep=15, window=5, gate=folder), queries=10**6, ahead=4)
    assert [layer[0] for layer in kept(read(model, policy, ids))] == best(scores, 15, sinks=4, window=5)
    assert best(scores, 15, sinks=4, window=5) != best(plain, 15, sinks=4, window=5)
    policy = headwise.Match(policy.policy, ahead=0)
    assert [layer[0] for layer in kept(read(model, policy, ids))] == best(plain, 15, sinks=4, window=5)


@pytest.mark.parametrize(
    "make",
    [
        headwise.KVzip,
        lambda keep, gate: headwise.PeakAttention(keep=keep, window=5, gate=gate),
        lambda keep, gate: headwise.Match(
            headwise.PeakAttention(keep=keep, window=5, gate=gate), queries=10**6, ahead=9
        ),
    ],
)
def test_padding_and_parts_change_nothing(model, folder, make):
    policy = make(0.4, gate=folder)
    prompts = [tiny.prompt(TOKENS, seed=3)[0], tiny.prompt(TOKENS - 14, seed=4)[0]]
    ids, mask = tiny.left_padded(*prompts)
    # Pads are words: the model's own pad is all zeros, and nobody would notice it.
    ids = ids.masked_fill(mask == 0, 50)
    alone = [kept(read(model, policy, prompt[None])) for prompt in prompts]
    for together in (read(model, policy, ids, mask), read(model, policy, ids, mask, pieces=11)):
        for layer, heads in enumerate(kept(together)):
            assert heads[0] == alone[0][layer][0]
            assert heads[1] == [{at + 14 for at in head} for head in alone[1][layer][0]]
    assert kept(read(model, policy, prompts[0][None], pieces=7)) == alone[0]


def test_nothing_is_repeated_and_no_tokenizer_or_ids_are_needed(model, folder):
    embeddings = model.get_input_embeddings()(tiny.prompt(20)).detach()
    passes = []
    handle = model.model.register_forward_pre_hook(lambda *_: passes.append(1))
    cache = headwise.HeadwiseCache(model, headwise.KVzip(5, gate=folder))
    with torch.no_grad():
        model(inputs_embeds=embeddings, past_key_values=cache)
    handle.remove()
    assert len(passes) == 1
    assert torch.cat([layer.core.kept_tokens for layer in cache.headwise_layers], dim=1).double().mean() == 5


@pytest.mark.parametrize("family", ["gpt2", "qwen3", *models.MIXED])
def test_models_of_any_kind(family, tmp_path):
    """Without a rotation, with norms of keys, and with layers that stay as they are."""
    model = models.shared(family)
    save_gates(gates_for(model), tmp_path)
    ids, mask = models.padded_pair()
    cache = headwise.HeadwiseCache(model, headwise.KVzip(9, gate=str(tmp_path)))
    models.generate(model, ids, cache, attention_mask=mask, max_new_tokens=6)
    found = torch.cat([layer.core.kept_tokens for layer in cache.headwise_layers], dim=1)
    assert (found.double().mean(dim=1) == 9 + 5).all()


def test_inputs_are_those_of_position_nought(model):
    """The same keys, wherever they stand; and where they stand beside them."""
    from headwise.hosts.transformers.model_facts import read_facts

    rotation = read_facts(model)[0].layers[0].rotation
    plain = torch.randn(1, 2, 6, 14)
    at = torch.tensor([[0, 3, 4, 9, 20, 31]])
    turned = rotation(plain, at, False)
    found = gate_inputs(turned, at, torch.tensor([[[32]]]), rotation)
    torch.testing.assert_close(found[..., :-PLACE], plain.transpose(1, 2).flatten(2), atol=1e-5, rtol=1e-4)
    expected = [math.log(21), math.log(12), 20 / 32, math.log(32)]
    torch.testing.assert_close(found[0, 4, -PLACE:], torch.tensor(expected))
    unturned = gate_inputs(turned, at, torch.tensor([[[32]]]), None)
    torch.testing.assert_close(unturned[..., :-PLACE], turned.transpose(1, 2).flatten(2))


def test_copied_and_saved_caches_go_on(model, folder, tmp_path):
    policy = headwise.PeakAttention(keep=9, window=3, gate=folder)
    cache = read(model, policy, tiny.prompt(TOKENS))
    cache.save(tmp_path / "cache.safetensors")
    loaded = headwise.HeadwiseCache.load(tmp_path / "cache.safetensors", model, policy)
    assert kept(loaded) == kept(copy.deepcopy(cache)) == kept(cache)
    with pytest.raises(MismatchError):
        headwise.HeadwiseCache.load(
            tmp_path / "cache.safetensors", model, headwise.PeakAttention(keep=9), tokenizer=tiny.tokenizer()
        )


def test_what_a_gate_drops_can_be_remembered(model, folder):
    from less_oracle import kernels_of, networks_of

    policy = headwise.Less(headwise.KVzip(5, gate=folder), kernels_of(model, networks_of(model)))
    cache = headwise.HeadwiseCache(model, policy)
    with torch.no_grad():
        model(input_ids=tiny.prompt(TOKENS), past_key_values=cache)
    assert cache.headwise_layers[0].core.evicted_bytes > 0
    assert kept(cache) == kept(read(model, policy.policy, tiny.prompt(TOKENS)))


# Folders.


def test_what_is_saved_comes_back(gates, folder):
    again = load_gates(Path(folder))
    assert again.digest == gates.digest
    assert repr(again) == f"<gates {gates.digest}>"
    assert (again.about, again.name) == (gates.about, folder)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: tiny.llama(layers=3, seed=1), "the weights of this one differ"),
        (lambda: tiny.llama(layers=2), r"this one differs in 'model\.layers\.2"),
    ],
)
def test_another_model_is_refused(folder, other, message):
    with pytest.raises(MismatchError, match=f"the gates in .* trained for Llama.*{message}.*`headwise train-gate`"):
        headwise.HeadwiseCache(other(), headwise.KVzip(5, gate=folder))


def test_folders_without_gates_are_refused(model, gates, tmp_path):
    with pytest.raises(InputError, match=r"no gates in .* `headwise train-gate` makes one"):
        headwise.HeadwiseCache(model, headwise.KVzip(5, gate=str(tmp_path)))
    save_gates(gates, tmp_path)
    tensors = load_file(tmp_path / "gates.safetensors")
    del tensors["layers.1.bias"]
    save_file(tensors, tmp_path / "gates.safetensors", {"format": "headwise-gate-1"})
    with pytest.raises(InputError, match="cannot be read"):
        load_gates(tmp_path)


def test_those_that_come_with_headwise_are_for_its_default_model(model):
    gates = load_gates(shipped_gates())
    assert len(gates.layers) == 30
    assert sum(file.stat().st_size for file in shipped_gates().iterdir()) < 5e6
    assert all(text["sha256"] for text in gates.about["texts"])
    with pytest.raises(MismatchError, match="trained for"):
        headwise.HeadwiseCache(model, headwise.PeakAttention(keep=9, gate=True))


# How it is asked for.


def test_words():
    assert parse_policy("peak-attention:keep=0.25,gate=true") == headwise.PeakAttention(keep=0.25, gate=True)
    assert parse_policy("kvzip:keep=0.25,gate=my/folder") == headwise.KVzip(0.25, gate="my/folder")
    assert parse_policy("kvzip:keep=0.25,gate=no") == headwise.KVzip(0.25)
    assert str(headwise.PeakAttention(0.9, gate=True)) == "PeakAttention(recovery=0.9, gate=True)"
    with pytest.raises(ConfigurationError, match="expected true or false"):
        parse_policy("streamingllm:window=9,within=folder")


@pytest.mark.parametrize("gate", [None, 1, ""])
def test_gates_that_are_none_are_refused(gate):
    with pytest.raises(ConfigurationError, match="gate must be True, False or the folder"):
        check_gate(gate)


@pytest.mark.parametrize("make", [headwise.KVzip, lambda keep, gate: headwise.PeakAttention(keep=keep, gate=gate)])
def test_policies_refuse_them(make):
    with pytest.raises(ConfigurationError, match="gate must be True, False or the folder"):
        make(5, gate="")
