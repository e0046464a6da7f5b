"""`headwise fit`: sizes without weights against those of real models, by hand, and what is advised."""

from __future__ import annotations

import json

import evidence
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache, LlamaConfig

import chatty
import headwise
from commands import assert_one_line, call
from headwise.errors import UnsupportedModelError
from headwise.measure.fit import evidence as shipped
from headwise.measure.fit import longest, options, recommended
from headwise.measure.peak_memory import peak_memory
from headwise.measure.sizes import model_sizes


def small(family, **changes):
    """A configuration of a family with a few narrow layers."""
    numbers = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return CONFIG_MAPPING[family](**numbers | {"num_hidden_layers": 4, "head_dim": 8, "vocab_size": 64} | changes)


def test_an_eight_billion_llama_by_hand():
    config = LlamaConfig(
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=14336,
        vocab_size=128256,
        max_position_embeddings=131072,
    )
    sizes = model_sizes(config, torch.bfloat16)
    assert sizes.parameters == 8_030_261_248 and sizes.weight_bytes == 2 * sizes.parameters
    assert sizes.token_bytes == 32 * 2 * 8 * 128 * 2 and len(sizes.compressed) == 32
    assert sizes.full_bytes(1000, 3) == 3 * 1000 * 131072
    assert sizes.held_bytes(1000, 3, 0.25) == 3 * 1000 * 131072 // 4
    full, *others = options(sizes, 1000, 3)
    assert full.writing == sizes.weight_bytes + full.held
    assert full.reading == full.writing + 3000 * 2 * (2 * 4096 + 3 * 14336)
    quarter = next(option for option in others if option.policy == "snapkv:keep=0.25")
    # A layer is compressed as soon as it has read.
    assert quarter.reading == full.reading - full.held + full.held // 4 + full.held // 32


@pytest.mark.parametrize(
    ("family", "changes", "compressed"),
    [
        ("llama", {}, 4),
        ("gemma3_text", {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"] * 2}, 2),
        ("mistral", {"sliding_window": 5}, 0),
    ],
)
def test_sizes_are_those_of_the_cache_of_a_real_model(family, changes, compressed):
    config = small(family, **changes)
    sizes = model_sizes(config, torch.float32)
    assert len(sizes.compressed) == compressed
    for tokens in (4, 23):
        cache = DynamicCache(config=config)
        with torch.no_grad():
            AutoModelForCausalLM.from_config(config)(torch.ones(2, tokens, dtype=torch.long), past_key_values=cache)
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        # What layers with a window count by takes a few bytes.
        assert held <= sizes.full_bytes(tokens, 2) <= held + 2 * 4 * 8


def test_what_cannot_be_made_without_weights_is_refused():
    with pytest.raises(UnsupportedModelError, match="cannot be told before it is loaded"):
        model_sizes(small("llama", num_key_value_heads=3), torch.float32)


@pytest.mark.parametrize("policy", ["full", "snapkv:keep=0.25"])
def test_what_is_said_of_reading_is_what_is_measured(policy):
    config = small("llama", hidden_size=256, intermediate_size=768, num_attention_heads=8, head_dim=32)
    model = AutoModelForCausalLM.from_config(config).eval()
    sizes = model_sizes(model.config, torch.float32)
    said = next(option for option in options(sizes, 500, 3) if option.policy == policy)
    cache, ids = headwise.HeadwiseCache(model, policy), torch.ones(3, 500, dtype=torch.long)
    with torch.no_grad(), peak_memory(torch.device("cpu")) as peak:
        model(ids, past_key_values=cache, logits_to_keep=1)
    # Page slack and tables are not counted, nor what attention itself works with.
    assert 0.75 * peak.bytes < said.reading - sizes.weight_bytes < 1.1 * peak.bytes


def test_the_first_that_fits_is_taken_and_its_longest_context_is_the_last_that_does():
    sizes = model_sizes(small("llama", max_position_embeddings=10**6), torch.float32)
    found = options(sizes, 4000, 2)
    assert [option.kl for option in found[1:]] == sorted(option.kl for option in found[1:])
    for memory in sorted({option.peak for option in found}):
        best = recommended(found, memory)
        assert best.peak <= memory and all(option.peak > memory for option in found[: found.index(best)])
        most = longest(sizes, 2, memory, best.policy)
        assert most >= 4000

        def peak(context, policy=best.policy):
            return next(option.peak for option in options(sizes, context, 2) if option.policy == policy)

        assert peak(most) <= memory < peak(most + 1)
    assert recommended(found, min(option.peak for option in found) - 1) is None
    assert longest(sizes, 2, sizes.weight_bytes - 1, "full") == 0
    # No further than the model's positions.
    assert longest(sizes, 1, 2**60, "full") == 10**6


def test_in_pieces_all_rows_are_there_until_the_last():
    sizes = model_sizes(small("llama"), torch.float32)
    full, *others = options(sizes, 4000, 1, chunk=100)
    assert full.reading == sizes.weight_bytes + full.held + 100 * sizes.work_bytes
    assert all(option.reading >= full.reading for option in others)


def test_the_evidence_is_that_of_the_records():
    collected = json.loads(json.dumps(evidence.collect()))
    assert sorted(row["policy"] for row in collected) == sorted(each.policy for each in shipped())
    for row in collected:
        (own,) = [each for each in shipped() if each.policy == row["policy"]]
        assert (own.share, own.kl, own.passages, list(own.records)) == tuple(
            row[name] for name in ("share", "kl", "passages", "records")
        )
        # A policy that can be built.
        headwise.policies.words.parse_policy(own.policy)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    chatty.save(tmp_path)
    monkeypatch.setenv("HEADWISE_MODEL", str(tmp_path))
    return tmp_path


def test_the_command_says_what_fits_and_what_to_take(folder):
    words = ("fit", "--context", 100, "--batch", 4, "--dtype", "float32")
    everything = call(*words, "--memory", "1GiB", "--json").json
    assert everything["recommended"] == "full" and everything["compressed_layers"] == chatty.LAYERS
    assert everything["token_bytes"] == chatty.LAYERS * 2 * chatty.KV_HEADS * 8 * 4
    (least,) = [o for o in everything["options"] if o["policy"] == "snapkv:keep=0.1"]
    less = call(*words, "--memory", f"{max(least['reading_bytes'], least['writing_bytes'])}B")
    assert less.code == 0 and 'HeadwiseCache(model, "snapkv:keep=0.1"' in less.out and "SmolLM2" in less.err
    nothing = call(*words, "--memory", "10KiB")
    assert nothing.code == 0 and "4 x 100 tokens do not fit" in nothing.out
    assert str(folder) in nothing.out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--context", 10, "--memory", "lots"), "64MiB"),
        (("--context", 10**6, "--memory", "1GiB"), "room for 128 tokens"),
        (("--context", 10, "--memory", "1GiB", "--model", "/no/such/model"), "cannot read the configuration"),
        (("--context", 10, "--memory", "1GiB", "--dtype", "bfloat"), "did you mean 'bfloat16'"),
        (("--context", 0, "--memory", "1GiB"), "--context"),
    ],
)
def test_what_cannot_be_is_refused(folder, words, says):
    assert_one_line(call("fit", *words), says)
