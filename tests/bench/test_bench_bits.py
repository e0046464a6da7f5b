"""The bench with fewer bits: every headwise cache runs once more with older rows as codes."""

from __future__ import annotations

import json

import pytest
import torch
from benching import bench

from headwise.bench import run
from headwise.bench.contenders import ContenderOptions
from headwise.errors import ConfigurationError
from headwise.policies import H2O, FastGen, Full
from headwise.policies.quantized import Quantized

LAYERS, KV_HEADS, DIM = 2, 2, 8
# Rows of a head that stay exact: the first 4 and the newest 16.
EXACT = 20


def small(*more):
    rounds = ("--steps", 2, "--rounds", 1, "--evict-every", 2, "--quantized", "none")
    return ("--context", 80, "--keep", "0.75", *rounds, *more)


def test_every_headwise_cache_runs_once_more_in_each_format(folder):
    said = bench("--model", folder, *small("--bits", "int8, k8v4", "--json"))
    assert said.code == 0, said.err
    found = {m["name"]: m for m in json.loads(said.out)["results"][0]["candidates"]}
    ours = ["full", "keep 75%"]
    assert list(found) == ["stock", *ours, *(f"{name}, int8" for name in ours), *(f"{name}, k8v4" for name in ours)]
    assert found["full, int8"]["setting"] == "Quantized(Full(), key_bits=8)"
    assert found["keep 75%, k8v4"]["setting"].startswith("Quantized(H2O(")

    def saved(name, held):
        return found[name][held]["used_bytes"] - found[f"{name}, {word}"][held]["used_bytes"]

    # Of a number in fp32 the code takes 1 byte or half of one; key and value have a step and a least number of 2 each.
    for word, codes in (("int8", 2 * DIM), ("k8v4", DIM + DIM // 2)):
        row = 2 * DIM * 4 - codes - 2 * 2 * 2
        for name, kept in (("full", 80), ("keep 75%", 60)):
            assert saved(name, "after_prompt") == LAYERS * KV_HEADS * (kept - EXACT) * row
            assert found[f"{name}, {word}"]["after_decode"]["kept_ratio"] == found[name]["after_decode"]["kept_ratio"]


def test_every_headwise_cache_runs_once_more_in_each_dtype(folder):
    said = bench("--model", folder, *small("--cache-dtype", "float16", "--json"))
    assert said.code == 0, said.err
    found = {m["name"]: m for m in json.loads(said.out)["results"][0]["candidates"]}
    assert list(found) == ["stock", "full", "keep 75%", "full, float16", "keep 75%, float16"]
    assert found["full, float16"]["setting"] == "Full(), rows in float16"
    for name, kept in (("full", 80), ("keep 75%", 60)):
        saved = found[name]["after_prompt"]["used_bytes"] - found[f"{name}, float16"]["after_prompt"]["used_bytes"]
        assert saved == LAYERS * KV_HEADS * kept * 2 * DIM * 2


def test_random_weights_have_bits_too():
    said = bench("--shape", "tiny", *small("--bits", "int4"))
    assert said.code == 0, said.err
    assert "keep 75%, int4" in said.out


def test_bits_come_before_graphs_and_less():
    asked = ContenderOptions(
        "h2o", [0.5], [0.9], [torch.float16], ["int4"], graph=True, less=True, backend="hqq", press="KnormPress"
    )
    names = [candidate.name for candidate in asked.at(80)]
    exact = ["full", "keep 50%", "FastGen 0.9"]
    plain = [*exact, *(f"{name}, float16" for name in exact), *(f"{name}, int4" for name in exact)]
    ours = [*plain, *(f"{name}, graph" for name in plain)]
    # What keeps everything has nothing to remember.
    evicting = [name for name in ours if not name.startswith("full")]
    less = [f"{name}, LESS" for name in evicting]
    assert names == ["stock", "quantized hqq", *ours, "kvpress 50%", *less]
    assert sorted(set(names)) == sorted(names)
    by_name = {candidate.name: candidate for candidate in asked.at(80)}
    both = by_name["keep 50%, int4, graph, LESS"]
    assert both.graph and both.keep == 0.5
    assert both.policy.policy == Quantized(H2O(heavy=0.25, recent=0.25))
    assert by_name["FastGen 0.9, int4"].policy == Quantized(FastGen(0.9))
    assert by_name["full, int4"].policy == Quantized(Full())
    assert [by_name[f"full{more}"].coded for more in ("", ", float16", ", int4")] == [False, False, True]


def test_less_of_fewer_bits_runs(folder):
    said = bench("--model", folder, *small("--bits", "int8", "--less-kernels", folder / "kernels", "--json"))
    assert said.code == 0, said.err
    found = {m["name"]: m for m in json.loads(said.out)["results"][0]["candidates"]}
    assert [name for name in found if name.endswith("LESS")] == ["keep 75%, LESS", "keep 75%, int8, LESS"]
    state = found["keep 75%, LESS"]["after_prompt"]["used_bytes"] - found["keep 75%"]["after_prompt"]["used_bytes"]
    coded = found["keep 75%, int8"]["after_prompt"]["used_bytes"]
    assert found["keep 75%, int8, LESS"]["after_prompt"]["used_bytes"] == coded + state


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("--bits", "int3"), "bits are int8, int4, k8v4 or k4v8, got 'int3'"),
        (("--bits", "int8,"), "got ''"),
        (("--bits", "int8,int8"), "'full, int8' is given twice"),
        (("--cache-dtype", "auto"), "--cache-dtype takes float16, bfloat16 or float32"),
        (("--cache-dtype", "half"), "unknown dtype 'half'"),
        (("--cache-dtype", "float16,float16"), "'full, float16' is given twice"),
    ],
)
def test_wrong_words_are_refused_before_anything_is_loaded(monkeypatch, given, says):
    monkeypatch.setattr(run, "run", lambda *_: pytest.fail("run"))
    said = bench("--shape", "tiny", *small(*given))
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("error: ") and said.err.count("\n") == 1
    assert says in said.err


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("--bits", "int8"), "leave out --bits"),
        (("--cache-dtype", "float16"), "leave out --cache-dtype"),
        (("--less",), "leave out --less"),
        (("--less-kernels", "folder"), "leave out --less"),
    ],
)
def test_targets_have_neither_bits_nor_less(given, says):
    said = bench("--targets", "--shape", "tiny", *given)
    assert said.code == 2
    assert says in said.err


def test_shares_are_asked_only_of_policies_that_have_them():
    with pytest.raises(ConfigurationError, match="keeps a given share"):
        ContenderOptions("fastgen", [0.5])
