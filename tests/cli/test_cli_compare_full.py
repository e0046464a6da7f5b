"""`headwise generate --compare-full`: where two texts differ, in tokens and in words."""

from __future__ import annotations

import re
import sys

import pytest
from asking import short
from transformers import LlamaForCausalLM

from headwise.cli.text_generation import differing_words, first_difference
from headwise.less.checkpoint import save_kernels
from headwise.policies import Full, Window
from headwise.policies.quantized import Quantized
from less_oracle import kernels_of, networks_of


def test_compare_full_of_full_has_no_difference(headwise):
    found = headwise(*short("--json", "--compare-full", "--policy", "full")).json
    assert set(found["full"]) == {"text", "first_difference", "memory"}
    assert found["full"]["first_difference"] is None
    assert found["full"]["text"] == found["text"]
    assert found["full"]["memory"]["used_bytes"] == found["memory"]["full_bytes"]
    assert "both texts are the same, all 12 new tokens" in headwise(*short("--compare-full", "--policy", "full")).err


def test_compare_full_finds_the_first_difference(headwise):
    harsh = ("--compare-full", "--policy", "window", "--set", "size=1")
    found = headwise(*short("--json", *harsh)).json
    # The prompt is attended to in full, so the first new token is always the same.
    assert 1 <= found["full"]["first_difference"] < 12
    assert found["full"]["text"] != found["text"]
    shown = headwise(*short(*harsh))
    assert shown.out == found["text"] + "\n"
    assert found["full"]["text"] in shown.err
    assert f"first differ in new token {found['full']['first_difference']}: " in shown.err


def test_the_difference_names_what_chooses_and_what_is_done_beside(headwise, folder, tmp_path):
    model = LlamaForCausalLM.from_pretrained(folder)
    save_kernels(kernels_of(model, networks_of(model)), tmp_path)
    harsh = short("--compare-full", "--policy", "h2o", "--set", "heavy=1", "--set", "recent=1")
    for more, name in (
        ((), "h2o"),
        (("--bits", "int4"), "h2o in 4 bits"),
        (("--less-kernels", tmp_path), "h2o with LESS"),
        (("--bits", "k8v4", "--less-kernels", tmp_path), "h2o in K8V4 with LESS"),
    ):
        assert re.search(rf"(the end|”) with {name}, ", headwise(*harsh, *more).err)


def test_policies_without_a_name_are_titled_as_they_are_written():
    both = Full() | Window(3)
    assert both.title == str(both)
    assert Quantized(both, 8).title == f"{both} in 8 bits"
    assert Quantized(Full(), 8, group=4).title == "full in K8V8G4"


def test_comparison_runs_the_models_own_attention(headwise, monkeypatch):
    seen = []

    generate = sys.modules["headwise.cli.generate"]
    generate_text = generate.generate_text

    def note(module, *_):
        seen.append(module.config._attn_implementation)

    def spy(model, *rest):
        handle = model.get_decoder().layers[0].self_attn.register_forward_hook(note)
        try:
            return generate_text(model, *rest)
        finally:
            handle.remove()

    monkeypatch.setattr(generate, "generate_text", spy)
    assert headwise(*short("--json", "--compare-full")).code == 0
    # But for the one pass that finds out what the model does.
    assert seen[:1] + sorted(set(seen)) == ["headwise", "headwise", "sdpa"]
    assert seen.index("sdpa") == seen.count("headwise")


@pytest.mark.parametrize(
    ("one", "other", "index"),
    [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1], [1, 2], 1), ([], [], None), ([5], [6], 0)],
)
def test_first_difference(one, other, index):
    assert first_difference(one, other) == index
    assert first_difference(other, one) == index


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        ("a cat sat", "a car sat", ("cat", "car")),
        ("cats sat", "cat sat", ("cats", "cat")),
        ("a b c", "a", ("b", "")),
        ("a b", "ab", ("a", "ab")),
        ("by the", "by\nthe", (" the", "\\nthe")),
        ("same", "same", ("", "")),
        ("", "x y", ("", "x")),
    ],
)
def test_differing_words(one, other, words):
    assert differing_words(one, other) == words
