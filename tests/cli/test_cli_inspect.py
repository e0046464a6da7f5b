"""`headwise inspect`: a page of one policy or two, and what is refused before anything is loaded."""

from __future__ import annotations

import json
import re

import pytest
from asking import QUESTION

from commands import assert_one_line


def panels_of(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page.read_text("utf-8"), re.DOTALL).group(1))["panels"]


def test_two_policies_side_by_side(headwise, document, tmp_path):
    out = tmp_path / "heads.html"
    policies = ("--policy", "snapkv:keep=0.5+int8", "--policy", "fastgen")
    answer = headwise("inspect", "--file", document, *policies, "--max-new-tokens", 6, "--moments", 3, "--out", out)
    assert (answer.code, answer.out) == (0, "") and f"page: {out}" in answer.err
    found = panels_of(out)
    assert [panel["policy"].partition("(")[0] for panel in found] == ["Quantized", "FastGen"]
    assert [moment["seen"] - found[0]["prompt"] for moment in found[0]["moments"]] == [0, 3, 5]


def test_unless_a_policy_is_named_it_is_what_generate_takes(headwise, tmp_path):
    out = tmp_path / "heads.html"
    headwise("inspect", "--prompt", QUESTION, "--max-new-tokens", 0, "--out", out)
    (panel,) = panels_of(out)
    taken = headwise("generate", "--prompt", QUESTION, "--max-new-tokens", 1, "--json").json
    assert panel["policy"].startswith("Match(Auto(ratio=0.25") and len(panel["moments"]) == 1
    assert panel["prompt"] == taken["prompt_tokens"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--policy", "full", "--policy", "full", "--policy", "full"), "at most two"),
        (("--policy", "snapk:keep=2"), "did you mean snapkv"),
        (("--policy", "snapkv"), "needs parameter keep"),
        (("--out", "-"), "needs the name of a file"),
        (("--out", "no/such/folder.html"), "there is no folder"),
        (("--kernel", "abacus"), "abacus"),
        (("--cache-dtype", "int3"), "unknown dtype"),
        (("--max-new-tokens", 900), "do not fit"),
    ],
)
def test_what_cannot_be_is_refused(words, says, headwise, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_one_line(headwise("inspect", "--prompt", QUESTION, *words), says)
    assert not list(tmp_path.iterdir())
