"""Bad input takes one line, whatever it is."""

from __future__ import annotations

import sys

import pytest
import torch
from asking import POSITIONS, QUESTION, short

from commands import assert_one_line

FASTGEN = ("--policy", "fastgen")

BAD = {
    "unknown policy": (("--policy", "fastgne"), "did you mean fastgen"),
    "recovery too large": (("--recovery", 1.5), "from 0 to 1"),
    "recovery not a number": (("--recovery", "nan"), "from 0 to 1"),
    "recovery is a word": (("--recovery", "high"), "--recovery"),
    "recovery elsewhere": (("--policy", "window", "--set", "size=3", "--recovery", 0.9), "no parameter 'recovery'"),
    "recovery twice": (("--recovery", 0.9, "--set", "recovery=0.9"), "given twice"),
    "fraction too large": ((*FASTGEN, "--set", "local=1.5"), "from 0.0 to 1.0"),
    "negative count": ((*FASTGEN, "--set", "local=-1"), "count from 0"),
    "unknown parameter": ((*FASTGEN, "--set", "locale=1"), "no parameter 'locale'"),
    "missing parameter": (("--policy", "window"), "--set size=VALUE"),
    "set without value": (("--set", "local"), "NAME=VALUE"),
    "set with a bad bool": ((*FASTGEN, "--set", "normalize=maybe"), "true or false"),
    "set with a bad word": ((*FASTGEN, "--set", "fold=max"), "min, mean"),
    "ladder without full": ((*FASTGEN, "--set", "ladder=special,local"), "full"),
    "ladder with unknown rule": ((*FASTGEN, "--set", "ladder=specials,full"), "unknown rule"),
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
    "bits of the one recommended": (("--bits", "int8"), "auto chooses the bits itself"),
    "bits of a policy that chooses them": (("--policy", "auto", "--bits", "int8"), "auto chooses the bits itself"),
    "no kernels of LESS": (
        (*FASTGEN, "--bits", "int8", "--less-kernels", "nowhere"),
        "no kernels of LESS in 'nowhere'",
    ),
    "unknown device": (("--device", "tpux"), "unknown device"),
    "impossible device": (("--device", "cpu:7"), "no device"),
    "no such model": (("--model", "no/such/model/anywhere"), "cannot load the model"),
    "unknown option": (("--recovry", 0.5), "--recovry"),
    "stray argument": (("stray",), "stray"),
}


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
