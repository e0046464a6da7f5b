"""The command line: every command on a tiny random model, and every kind of bad input."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

import chatty
from chatty import KV_HEADS, LAYERS, TEXT
from headwise.cli.main import main
from headwise.cli.streaming import TextStream
from headwise.cli.text_generation import differing_words, first_difference
from headwise.errors import ConfigurationError
from headwise.less.checkpoint import save_kernels
from headwise.policies import H2O, FastGen, Full, StreamingLLM, Window
from headwise.policies.quantized import Quantized
from headwise.policies.words import build_policy, describe_policy
from less_oracle import kernels_of, networks_of

POSITIONS = 128
QUESTION = "Who sat on the log?"


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture(scope="session")
def tokenizer():
    # Bytes: what a random model writes is mostly not UTF-8, and streaming must cope.
    return chatty.tokenizer()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return chatty.save(tmp_path_factory.mktemp("tiny"), POSITIONS)


@pytest.fixture
def headwise(capsys, folder, monkeypatch):
    monkeypatch.setenv("HEADWISE_MODEL", str(folder))

    def call(*arguments, stdin=None):
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(left.value.code, captured.out, captured.err)

    return call


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "document.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def short(*more):
    return ("generate", "--prompt", QUESTION, "--max-new-tokens", 12, *more)


# generate


def test_json_is_one_object_of_this_schema_and_nothing_else(headwise):
    result = headwise(*short("--json"))
    assert (result.code, result.err) == (0, "")
    found = result.json
    assert set(found) == {
        "text",
        "prompt_tokens",
        "new_tokens",
        "policy",
        "memory",
        "kept_ratio",
        "rules",
        "kernel",
        "seconds",
    }
    assert found["new_tokens"] == 12
    assert found["policy"]["name"] == "fastgen"
    assert found["policy"]["parameters"]["recovery"] == 0.95
    assert found["policy"]["parameters"]["ladder"] == list(FastGen(0.95).ladder)
    assert set(found["memory"]) == {"used_bytes", "allocated_bytes", "full_bytes"}
    row = 2 * 8 * 4  # key and value, head dimension, fp32
    assert found["memory"]["full_bytes"] == row * LAYERS * KV_HEADS * (found["prompt_tokens"] + 11)
    assert 0 < found["memory"]["used_bytes"] <= found["memory"]["allocated_bytes"]
    assert 0 < found["kept_ratio"] <= 1
    assert sum(found["rules"].values()) == LAYERS * KV_HEADS
    assert set(found["seconds"]) == {"load", "prefill", "profile", "compact", "decode"}
    assert all(seconds > 0 for seconds in found["seconds"].values())


def test_prompt_tokens_are_those_of_the_chat_template_unless_raw(headwise, tokenizer):
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_dict=True
    )
    assert headwise(*short("--json")).json["prompt_tokens"] == len(chat["input_ids"])
    assert headwise(*short("--json", "--raw")).json["prompt_tokens"] == len(tokenizer(QUESTION)["input_ids"])


def test_what_streams_is_what_json_holds(headwise):
    told = headwise(*short("--json")).json["text"]
    streamed = headwise(*short())
    assert streamed.code == 0
    assert streamed.out == told + "\n"
    assert told.strip()


def test_text_is_greedy_and_the_same_as_the_models_own(headwise, folder, tokenizer):
    model = LlamaForCausalLM.from_pretrained(folder)
    ids = tokenizer(QUESTION, return_tensors="pt").input_ids
    new = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    expected = tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert headwise(*short("--raw", "--policy", "full", "--json")).json["text"] == expected


def test_pieces_of_a_stream_are_whole_characters(tokenizer):
    ids = tokenizer("naïve café ☕ done")["input_ids"]
    pieces = []
    stream = TextStream(tokenizer, pieces.append)
    stream.put(torch.tensor([[1, 2, 3]]))  # the prompt, which is no output
    for token in ids:
        stream.put(torch.tensor([token]))
    stream.end()
    assert "".join(pieces) == stream.text == "naïve café ☕ done"
    assert len(pieces) > 3
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_text_that_ends_inside_a_character_is_passed_on_at_the_end(tokenizer):
    ids = tokenizer("a ☕")["input_ids"][:-1]
    pieces = []
    stream = TextStream(tokenizer, pieces.append)
    stream.put(torch.tensor([[1]]))
    for token in ids:
        stream.put(torch.tensor([token]))
    stream.end()
    assert "".join(pieces) == stream.text
    assert stream.text.endswith("\ufffd")


def test_costs_go_to_standard_error(headwise):
    result = headwise(*short())
    for word in ("memory held", "memory used", "full cache", "saved", "kept", "rules of 4 heads", "prefill", "decode"):
        assert word in result.err
        assert word not in result.out


def test_document_and_question_are_joined_by_a_blank_line(headwise, document):
    both = headwise("generate", "--file", document, "--prompt", QUESTION, "--max-new-tokens", 12, "--json").json
    joined = headwise("generate", "--prompt", f"{TEXT}\n\n{QUESTION}", "--max-new-tokens", 12, "--json").json
    assert both["text"] == joined["text"]
    assert both["prompt_tokens"] == joined["prompt_tokens"]


def test_standard_input(headwise):
    piped = headwise("generate", "--file", "-", "--max-new-tokens", 12, "--json", stdin=QUESTION.encode()).json
    assert piped["text"] == headwise(*short("--json")).json["text"]


def test_byte_order_mark_is_no_part_of_the_text(headwise, tmp_path):
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbf" + QUESTION.encode())
    marked = headwise("generate", "--file", tmp_path / "bom.txt", "--max-new-tokens", 2, "--json").json
    assert marked["prompt_tokens"] == headwise(*short("--json")).json["prompt_tokens"]


def test_seed_repeats_a_draw_and_temperature_0_ignores_it(headwise):
    def text(*more):
        return headwise(*short("--json", *more)).json["text"]

    assert text("--temperature", 2, "--seed", 1) == text("--temperature", 2, "--seed", 1)
    assert text("--temperature", 2, "--seed", 1) != text("--temperature", 2, "--seed", 2)
    assert text("--seed", 1) == text("--seed", 2)


def test_prefill_in_chunks_keeps_the_same_and_says_the_same(headwise, recwarn):
    whole = headwise(*short("--json")).json
    chunked = headwise(*short("--json", "--prefill-chunk", 7)).json
    assert chunked["text"] == whole["text"]
    assert chunked["rules"] == whole["rules"]
    assert chunked["memory"]["used_bytes"] == whole["memory"]["used_bytes"]


def test_without_chat_template_the_prompt_is_raw_and_a_note_says_so(headwise, folder, tmp_path):
    copy = tmp_path / "plain"
    copy.mkdir()
    for file in folder.iterdir():
        if file.name != "chat_template.jinja":
            (copy / file.name).write_bytes(file.read_bytes())
    result = headwise(*short("--json", "--model", copy))
    assert result.code == 0
    assert result.err.startswith("note: ")
    assert result.err.count("\n") == 1
    assert result.json["text"] == headwise(*short("--json", "--raw")).json["text"]


def test_sampled_profile_says_so(headwise):
    assert headwise(*short("--json", "--set", "profile_rows=0.5")).json["sampled"] == pytest.approx(0.5, abs=0.1)
    assert "a sample" in headwise(*short("--set", "profile_rows=0.5")).err
    assert "a sample" not in headwise(*short()).err


def test_dtype_halves_the_cache(headwise):
    wide = headwise(*short("--json", "--dtype", "float32", "--policy", "full")).json
    narrow = headwise(*short("--json", "--dtype", "bfloat16", "--policy", "full")).json
    assert wide["memory"]["full_bytes"] == 2 * narrow["memory"]["full_bytes"]


def lengthy(command, *more):
    """Of a prompt that is much longer than the rows that stay exact in any format."""
    return (command, "--raw", "--prompt", f"{TEXT} " * 4, "--policy", "full", "--json", *more)


@pytest.mark.parametrize("command", ["generate", "profile"])
@pytest.mark.parametrize(("bits", "codes"), [("int8", 8 + 8), ("int4", 4 + 4), ("k8v4", 8 + 4)])
def test_bits_shrink_older_rows(headwise, command, bits, codes):
    few = ("--max-new-tokens", 1) if command == "generate" else ()
    wide, narrow = headwise(*lengthy(command, *few)).json, headwise(*lengthy(command, *few, "--bits", bits)).json
    # Key and value have 8 numbers of 4 bytes, or codes with a step and a least number of 2 bytes each; the first 4 rows
    # of a head and the newest 16 stay exact.
    older = LAYERS * KV_HEADS * (wide["prompt_tokens"] - 20)
    saved = wide["memory"]["used_bytes"] - narrow["memory"]["used_bytes"]
    assert older > 0 and saved == older * (2 * 8 * 4 - codes - 2 * 2 * 2)
    assert narrow["memory"]["full_bytes"] == wide["memory"]["full_bytes"]
    assert narrow["kept_ratio"] == wide["kept_ratio"] == 1
    assert narrow["policy"]["name"] == "quantized"
    assert narrow["policy"]["parameters"]["policy"] == "full"


@pytest.mark.parametrize("command", ["generate", "profile"])
def test_rows_can_be_narrower_than_the_model(headwise, command):
    few = ("--max-new-tokens", 1) if command == "generate" else ()
    wide = headwise(*lengthy(command, *few, "--cache-dtype", "float32")).json
    narrow = headwise(*lengthy(command, *few, "--cache-dtype", "float16")).json
    # Of key and value, 8 numbers each, 2 bytes of 4.
    saved = LAYERS * KV_HEADS * wide["prompt_tokens"] * 2 * 8 * 2
    assert wide["memory"]["used_bytes"] - narrow["memory"]["used_bytes"] == saved
    assert narrow["memory"]["full_bytes"] == wide["memory"]["full_bytes"]
    assert headwise(*lengthy(command, *few)).json["memory"] == wide["memory"]


def test_bytes_buy_more_rows_of_less_width(headwise):
    """A row's column takes 4 bytes: of 4 heads, 4 x 68 or 4 x 36 bytes a token."""
    asked = ("profile", "--raw", "--prompt", f"{TEXT} " * 4, "--policy", "snapkv", "--json", "--budget", "8KiB")
    for dtype, tokens in (("float32", 30), ("float16", 56)):
        found = headwise(*asked, "--cache-dtype", dtype).json
        heads = [head["kept_tokens"] for layer in found["layers"] for head in layer["heads"]]
        assert heads == [tokens] * LAYERS * KV_HEADS


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

    def spy(model, *rest):
        seen.append(model.get_decoder().config._attn_implementation)
        return generate_text(model, *rest)

    monkeypatch.setattr(generate, "generate_text", spy)
    assert headwise(*short("--json", "--compare-full")).code == 0
    assert seen == ["headwise", "sdpa"]


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


# profile


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
    assert headwise("profile", "--prompt", QUESTION, "--json").json["rules"] == headwise(*short("--json")).json["rules"]


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


# policies and doctor


def test_policies(headwise):
    listed = {entry["name"]: entry for entry in headwise("policies", "--json").json}
    assert {"fastgen", "full", "h2o", "random", "streamingllm", "window"} <= set(listed)
    assert all(entry["summary"].endswith(".") for entry in listed.values())
    parameters = {parameter["name"]: parameter for parameter in listed["streamingllm"]["parameters"]}
    assert parameters["window"] == {"name": "window", "default": None, "required": True}
    assert parameters["sinks"] == {"name": "sinks", "default": 4, "required": False}
    shown = headwise("policies")
    assert all(name in shown.out for name in listed)
    assert "window (required)" in shown.out
    assert "sinks=4" in shown.out


def test_doctor(headwise, folder):
    found = headwise("doctor", "--json").json
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["devices"][0]["name"] == "cpu"
    assert found["threads"] == torch.get_num_threads()
    assert found["kernels"]["cpu"]["default"] == "cpu"
    assert found["kernels"]["cpu"]["obstacles"]["cpu"] is None
    assert found["kernels"]["cpu"]["obstacles"]["reference"] is None
    assert found["default_model"] == {"name": str(folder), "chosen_by": "HEADWISE_MODEL", "present": True}
    shown = headwise("doctor")
    assert torch.__version__ in shown.out
    assert str(folder) in shown.out.replace("\n", "")


def test_doctor_says_why_kernels_cannot_run(headwise, monkeypatch):
    monkeypatch.setattr("headwise.kernels.cpu.library.load", lambda: "they were not compiled")
    monkeypatch.delenv("TRITON_INTERPRET")
    found = headwise("doctor", "--json").json["kernels"]["cpu"]
    assert found["default"] == "reference"
    assert found["obstacles"]["cpu"] == "they were not compiled"
    assert found["obstacles"]["triton"]
    assert "cpu: they were not compiled" in headwise("doctor").out


def test_kernels_are_those_asked_for(headwise):
    for name in ("cpu", "reference"):
        shown = headwise("generate", "--prompt", QUESTION, "--kernel", name, "--max-new-tokens", "2", "--json").json
        assert shown["kernel"] == name
        shown = headwise("profile", "--prompt", QUESTION, "--kernel", name, "--json").json
        assert shown["kernel"] == name
    refused = headwise("generate", "--prompt", QUESTION, "--kernel", "fastest")
    assert refused.code == 2
    assert "unknown kernel 'fastest'; available: auto, cpu, triton, reference" in refused.err.replace("\n", " ")


def test_doctor_sees_that_the_model_or_an_extra_is_missing(headwise, monkeypatch, tmp_path):
    monkeypatch.setenv("HEADWISE_MODEL", str(tmp_path / "nowhere"))
    monkeypatch.setitem(sys.modules["headwise.cli.doctor"]._EXTRAS, "plot", ("no-such-package",))
    found = headwise("doctor", "--json").json
    assert found["default_model"]["present"] is False
    assert found["extras"]["plot"] == {"no-such-package": None}
    assert "no-such-package missing: pip install 'headwise[plot]'" in headwise("doctor").out


def test_help_and_version(headwise):
    assert "generate" in headwise().out
    assert "--compare-full" in headwise("generate", "--help").out
    assert headwise("--version").out.startswith("headwise 0.")


# pictures


@pytest.mark.parametrize("command", ["generate", "profile"])
def test_picture(headwise, tmp_path, command):
    target = tmp_path / "map.png"
    more = ("--max-new-tokens", 2) if command == "generate" else ()
    assert headwise(command, "--prompt", QUESTION, *more, "--png", target, "--json").code == 0
    assert target.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert [path.name for path in tmp_path.iterdir()] == ["map.png"]


# settings


def test_settings_become_values_of_the_right_type():
    assert build_policy("h2o", None, ["heavy=0.5", "recent=64"]) == H2O(0.5, 64)
    assert build_policy("streamingllm", None, [" window = 1.0 "]) == StreamingLLM(1.0)
    policy = build_policy("fastgen", 0.5, ["normalize=True", "fold=mean", "ladder=special, full", "local=8"])
    assert policy == FastGen(0.5, normalize=True, fold="mean", ladder=("special", "full"), local=8)
    assert build_policy("fastgen", None, ["recovery=1"]) == FastGen(1.0)
    assert build_policy("fastgen") == FastGen(0.95)


def test_rules_in_a_ladder_are_described_by_their_labels():
    policy = FastGen(0.5, ladder=("special", StreamingLLM(8).rungs[0], "full"))
    described = describe_policy(policy)
    assert described["parameters"]["ladder"] == ["special", "sinks+local", "full"]
    json.dumps(described)


@pytest.mark.parametrize(
    "settings", [["window"], ["window="], ["=4"], ["window=x"], ["window=1", "window=2"], [f"window={10**30}"]]
)
def test_bad_settings(settings):
    with pytest.raises(ConfigurationError):
        build_policy("streamingllm", None, settings)


# bad input: arguments, and what the line must say

BAD = {
    "unknown policy": (("--policy", "fastgne"), "did you mean fastgen"),
    "recovery too large": (("--recovery", 1.5), "from 0 to 1"),
    "recovery not a number": (("--recovery", "nan"), "from 0 to 1"),
    "recovery is a word": (("--recovery", "high"), "--recovery"),
    "recovery elsewhere": (("--policy", "window", "--set", "size=3", "--recovery", 0.9), "no parameter 'recovery'"),
    "recovery twice": (("--recovery", 0.9, "--set", "recovery=0.9"), "given twice"),
    "fraction too large": (("--set", "local=1.5"), "from 0.0 to 1.0"),
    "negative count": (("--set", "local=-1"), "count from 0"),
    "unknown parameter": (("--set", "locale=1"), "no parameter 'locale'"),
    "missing parameter": (("--policy", "window"), "--set size=VALUE"),
    "set without value": (("--set", "local"), "NAME=VALUE"),
    "set with a bad bool": (("--set", "normalize=maybe"), "true or false"),
    "set with a bad word": (("--set", "fold=max"), "min, mean"),
    "ladder without full": (("--set", "ladder=special,local"), "full"),
    "ladder with unknown rule": (("--set", "ladder=specials,full"), "unknown rule"),
    "no new tokens": (("--max-new-tokens", 0), "--max-new-tokens"),
    "too many new tokens": (("--max-new-tokens", POSITIONS), "at most"),
    "prompt too long": (("--prompt", "cat! " * 200), f"room for {POSITIONS}"),
    "empty prompt": (("--prompt", ""), "empty"),
    "blank prompt": (("--prompt", " \n"), "empty"),
    "prompt of bytes": (("--prompt", "\udcff"), "UTF-8"),
    "negative temperature": (("--temperature", -1), "0 or more"),
    "no temperature": (("--temperature", "nan"), "0 or more"),
    "negative seed": (("--seed", -1), "--seed"),
    "huge seed": (("--seed", 2**64), "seed"),
    "no chunk": (("--prefill-chunk", 0), "--prefill-chunk"),
    "unknown dtype": (("--dtype", "float8"), "unknown dtype"),
    "unknown dtype of rows": (("--cache-dtype", "float8"), "unknown dtype 'float8'"),
    "unknown bits": (("--bits", "int3"), "bits are int8, int4, k8v4 or k4v8, got 'int3'"),
    "bits of a policy that chooses them": (("--policy", "auto", "--bits", "int8"), "auto chooses the bits itself"),
    "no kernels of LESS": (("--bits", "int8", "--less-kernels", "nowhere"), "no kernels of LESS in 'nowhere'"),
    "unknown device": (("--device", "tpux"), "unknown device"),
    "impossible device": (("--device", "cpu:7"), "no device"),
    "no such model": (("--model", "no/such/model/anywhere"), "cannot load the model"),
    "unknown option": (("--recovry", 0.5), "--recovry"),
    "stray argument": (("stray",), "stray"),
}


def assert_one_line(result, says):
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert says in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("output", [(), ("--json",)], ids=["text", "json"])
def test_bad_input_takes_one_line(headwise, tmp_path, case, output):
    arguments, says = BAD[case]
    assert_one_line(headwise(*short("--png", tmp_path / "map.png"), *output, *arguments), says)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu(headwise):
    assert_one_line(headwise(*short("--device", "cuda")), "no device 'cuda'")


@pytest.mark.parametrize("given", ["unknown bits", "unknown dtype of rows"])
def test_profile_refuses_them_too(headwise, given):
    arguments, says = BAD[given]
    assert_one_line(headwise("profile", "--prompt", QUESTION, *arguments), says)


@pytest.mark.parametrize("command", ["generate", "profile"])
def test_no_prompt(headwise, command):
    assert_one_line(headwise(command), "no prompt")


@pytest.mark.parametrize("command", ["generate", "profile"])
@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing.txt", None, "no file"),
        (".", None, "is a folder"),
        ("latin.txt", b"caf\xe9", "is not UTF-8"),
        ("empty.txt", b"", "is empty"),
        ("null\0.txt", None, "cannot read"),
    ],
)
def test_bad_files(headwise, tmp_path, command, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert_one_line(headwise(command, "--file", f"{tmp_path}/{name}"), says)


@pytest.mark.parametrize("given", [b"", b"\xff\xfe"], ids=["empty", "not UTF-8"])
def test_bad_standard_input(headwise, given):
    assert_one_line(headwise("generate", "--file", "-", stdin=given), "standard input")


def test_no_such_command(headwise):
    assert_one_line(headwise("generat"), "generate")


def test_profile_of_a_prompt_that_is_too_long(headwise):
    assert_one_line(headwise("profile", "--prompt", "cat! " * 200), f"room for {POSITIONS}")


def test_prompt_that_leaves_no_position(headwise, tokenizer):
    text = "!" * POSITIONS
    assert len(tokenizer(text)["input_ids"]) == POSITIONS
    assert_one_line(headwise("generate", "--raw", "--prompt", text, "--max-new-tokens", 1), f"{POSITIONS} tokens")
    assert headwise("generate", "--raw", "--prompt", text[1:], "--max-new-tokens", 1).code == 0
    assert_one_line(headwise("generate", "--raw", "--prompt", text[1:], "--max-new-tokens", 2), "at most 1\n")


@pytest.mark.parametrize("target", ["nowhere/map.png", ".", "-", "/dev/null"])
@pytest.mark.parametrize("command", ["generate", "profile"])
def test_bad_picture_is_refused_before_the_model_is_loaded(headwise, tmp_path, monkeypatch, command, target):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules[f"headwise.cli.{command}"], "load", lambda *_: pytest.fail("loaded"))
    assert_one_line(headwise(command, "--prompt", QUESTION, "--png", target), "picture")
    assert list(tmp_path.iterdir()) == []


def test_chat_template_that_refuses(headwise, folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no users here') }}")
    assert_one_line(headwise(*short("--model", tmp_path)), "no users here")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_broken_model(headwise, folder, tmp_path, name):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).write_bytes(b"{broken")
    assert_one_line(headwise(*short("--model", tmp_path)), "cannot load the model")


# the process


def start(folder, *arguments):
    environment = {**os.environ, "HEADWISE_MODEL": str(folder), "PYTHONPATH": str(Path(__file__).parents[1] / "src")}
    return subprocess.Popen(
        [sys.executable, "-m", "headwise.cli.main", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
        # What runs in the background of a script ignores the interrupt, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def test_interrupt_leaves_with_130_and_one_line(folder, tmp_path):
    # Standard input that never ends: the command waits inside, past all imports of its own.
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    process = start(folder, "generate", "--file", pipe)
    writer = None
    while writer is None and process.poll() is None:
        with contextlib.suppress(OSError):  # nobody reads yet
            writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        time.sleep(0.05)
    try:
        # A signal just before a read begins to wait wakes nobody; as a person would, it is sent again.
        for _ in range(6):
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                out, err = process.communicate(timeout=10)
                break
    finally:
        process.kill()
        os.close(writer)
    assert process.returncode == 130
    assert (out, err.strip()) == ("", "interrupted")


def test_a_reader_who_leaves_early_hears_no_complaint(folder):
    process = start(folder, "policies", "--json")
    with process:
        process.stdout.close()
        err = process.stderr.read()
    assert err == ""
    assert process.returncode == 1
