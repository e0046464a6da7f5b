"""`headwise profile`: every head's rule, as JSON and as a table."""

from __future__ import annotations

from asking import QUESTION, short

from chatty import KV_HEADS, LAYERS
from headwise.policies import FastGen


def test_profile_json(headwise, document):
    found = headwise("profile", "--file", document, "--json").json
    assert found["rungs"] == [rung.label for rung in FastGen(0.95).rungs]
    assert [layer["layer"] for layer in found["layers"]] == list(range(LAYERS))
    for layer in found["layers"]:
        assert [head["head"] for head in layer["heads"]] == list(range(KV_HEADS))
        for head in layer["heads"]:
            masses = head["recovered"]
            assert len(masses) == len(found["rungs"])
            assert masses == sorted(masses)  # every rung of this ladder keeps what the one before keeps
            assert masses[found["rungs"].index(head["rule"])] >= 0.95
            assert 0 < head["kept_tokens"] <= found["prompt_tokens"]
    assert sum(found["rules"].values()) == LAYERS * KV_HEADS


def test_profile_chooses_what_generate_chooses(headwise):
    told = headwise(*short("--json", "--policy", "fastgen")).json
    assert headwise("profile", "--prompt", QUESTION, "--json").json["rules"] == told["rules"]


def test_profile_table_has_a_line_for_every_head_on_standard_output(headwise, document):
    result = headwise("profile", "--file", document, "--recovery", 0.5)
    assert (result.code, result.err) == (0, "")
    found = headwise("profile", "--file", document, "--recovery", 0.5, "--json").json
    for layer in found["layers"]:
        for head in layer["heads"]:
            line = next(line for line in result.out.splitlines() if f" {head['kept_tokens']} (" in line)
            assert head["rule"] in line
            mass = head["recovered"][found["rungs"].index(head["rule"])]
            assert f"*{int(mass * 1000) / 1000:.3f}" in result.out
    assert result.out.count("*") == LAYERS * KV_HEADS


def test_profile_of_a_policy_without_choice_recovers_nothing(headwise):
    arguments = ("profile", "--prompt", QUESTION, "--policy", "streamingllm", "--set", "window=3", "--set", "sinks=2")
    found = headwise(*arguments, "--json").json
    heads = [head for layer in found["layers"] for head in layer["heads"]]
    assert {head["kept_tokens"] for head in heads} == {5}
    assert {head["recovered"] for head in heads} == {None}
    assert headwise(*arguments).code == 0
