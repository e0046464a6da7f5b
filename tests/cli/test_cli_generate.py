"""`headwise generate`: what it writes, where, and what the options of prompt and sampling do."""

from __future__ import annotations

import pytest
from asking import QUESTION, short
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from chatty import KV_HEADS, LAYERS, TEXT
from headwise import load_default_model
from headwise.cli.cache_request import read_cache_request
from headwise.errors import UnsupportedModelError
from headwise.policies import Auto, Match
from headwise.policies.words import describe_policy


def test_json_is_one_object_of_this_schema_and_nothing_else(told):
    found = told
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
    assert found["policy"] == describe_policy(Match(Auto(ratio=0.25)))
    assert set(found["memory"]) == {"used_bytes", "allocated_bytes", "full_bytes"}
    row = 2 * 8 * 4  # key and value, head dimension, fp32
    assert found["memory"]["full_bytes"] == row * LAYERS * KV_HEADS * (found["prompt_tokens"] + 11)
    assert 0 < found["memory"]["used_bytes"] <= found["memory"]["allocated_bytes"]
    assert 0 < found["kept_ratio"] <= 1
    assert sum(found["rules"].values()) == LAYERS * KV_HEADS
    assert set(found["seconds"]) == {"load", "prefill", "profile", "compact", "decode"}
    assert all(seconds > 0 for seconds in found["seconds"].values())


def test_prompt_tokens_are_those_of_the_chat_template_unless_raw(headwise, told, tokenizer):
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_dict=True
    )
    assert told["prompt_tokens"] == len(chat["input_ids"])
    assert headwise(*short("--json", "--raw")).json["prompt_tokens"] == len(tokenizer(QUESTION)["input_ids"])


def test_what_streams_is_what_json_holds(headwise, told):
    streamed = headwise(*short())
    assert streamed.code == 0
    assert streamed.out == told["text"] + "\n"
    assert told["text"].strip()


def test_text_is_greedy_and_the_same_as_the_models_own(headwise, folder, tokenizer):
    model = LlamaForCausalLM.from_pretrained(folder)
    ids = tokenizer(QUESTION, return_tensors="pt").input_ids
    new = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    expected = tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert headwise(*short("--raw", "--policy", "full", "--json")).json["text"] == expected


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


def test_standard_input(headwise, told):
    piped = headwise("generate", "--file", "-", "--max-new-tokens", 12, "--json", stdin=QUESTION.encode()).json
    assert piped["text"] == told["text"]


def test_byte_order_mark_is_no_part_of_the_text(headwise, told, tmp_path):
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbf" + QUESTION.encode())
    marked = headwise("generate", "--file", tmp_path / "bom.txt", "--max-new-tokens", 2, "--json").json
    assert marked["prompt_tokens"] == told["prompt_tokens"]


def test_seed_repeats_a_draw_and_temperature_0_ignores_it(headwise):
    def text(*more):
        return headwise(*short("--json", *more)).json["text"]

    assert text("--temperature", 2, "--seed", 1) == text("--temperature", 2, "--seed", 1)
    assert text("--temperature", 2, "--seed", 1) != text("--temperature", 2, "--seed", 2)
    assert text("--seed", 1) == text("--seed", 2)


def test_prefill_in_chunks_keeps_the_same_and_says_the_same(headwise, told, recwarn):
    chunked = headwise(*short("--json", "--prefill-chunk", 7)).json
    assert chunked["text"] == told["text"]
    assert chunked["rules"] == told["rules"]
    assert chunked["memory"]["used_bytes"] == told["memory"]["used_bytes"]


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
    asked = ("--policy", "fastgen")
    sampled = (*asked, "--set", "profile_rows=0.5")
    assert headwise(*short("--json", *sampled)).json["sampled"] == pytest.approx(0.5, abs=0.1)
    assert "a sample" in headwise(*short(*sampled)).err
    assert "a sample" not in headwise(*short(*asked)).err


RECOMMENDED = {
    (): Match(Auto(ratio=0.25)),
    ("--budget", 0.5): Match(Auto(ratio=0.5)),
    ("--recovery", 0.9): Match(Auto(recovery=0.9)),
    ("--set", "ratio=40", "--set", "window=8"): Match(Auto(ratio=40, window=8)),
    ("--set", "sinks=2"): Match(Auto(ratio=0.25, sinks=2)),
    ("--budget", 0.5, "--match"): Match(Auto(ratio=0.5)),
}


@pytest.mark.parametrize("asked", RECOMMENDED, ids=str)
def test_where_no_policy_is_named_it_is_the_one_recommended(headwise, asked):
    assert headwise(*short("--json", *asked)).json["policy"] == describe_policy(RECOMMENDED[asked])


def test_the_one_recommended_is_fitted_to_the_model(folder, tokenizer):
    policy = read_cache_request(None, None, None, None, None, False, None, False, "auto", "auto")
    own = LlamaForCausalLM.from_pretrained(folder)
    assert policy.make(own, tokenizer).policy == Match(Auto(ratio=0.25))
    # Its positions are learned: nothing can be turned to others.
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50)).eval()
    assert policy.make(gpt2, tokenizer).policy == Auto(ratio=0.25)
    named = read_cache_request("auto", None, ["ratio=0.25"], None, None, False, None, True, "auto", "auto")
    with pytest.raises(UnsupportedModelError, match="turns queries to positions to come"):
        named.make(gpt2, tokenizer)


@pytest.mark.model
def test_the_one_recommended_asks_gates_where_there_are_some():
    model, tokenizer = load_default_model()
    asked = read_cache_request(None, None, None, None, None, False, None, False, "auto", "auto")
    assert asked.make(model, tokenizer).policy == Match(Auto(ratio=0.25, gate=True))
    without = read_cache_request(None, None, ["gate=false"], None, None, False, None, False, "auto", "auto")
    assert without.make(model, tokenizer).policy == Match(Auto(ratio=0.25))


def test_kernels_are_those_asked_for(headwise):
    for name in ("cpu", "reference"):
        shown = headwise("generate", "--prompt", QUESTION, "--kernel", name, "--max-new-tokens", "2", "--json").json
        assert shown["kernel"] == name
        shown = headwise("profile", "--prompt", QUESTION, "--kernel", name, "--json").json
        assert shown["kernel"] == name
    refused = headwise("generate", "--prompt", QUESTION, "--kernel", "fastest")
    assert refused.code == 2
    assert "unknown kernel 'fastest'; available: auto, cpu, triton, reference" in refused.err.replace("\n", " ")


@pytest.mark.parametrize("command", ["generate", "profile"])
def test_picture(headwise, tmp_path, command):
    target = tmp_path / "map.png"
    more = ("--max-new-tokens", 2) if command == "generate" else ()
    assert headwise(command, "--prompt", QUESTION, *more, "--png", target, "--json").code == 0
    assert target.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert [path.name for path in tmp_path.iterdir()] == ["map.png"]
