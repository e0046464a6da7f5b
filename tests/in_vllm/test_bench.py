"""The benchmark beside vLLM alone, on loads so small that nothing is learnt from them."""

from __future__ import annotations

import json

import engines

import chatty
import commands


def test_the_command(tmp_path):
    folder, out = tmp_path / "model", tmp_path / "found.json"
    engines.save_model(folder, len(chatty.tokenizer()))
    chatty.tokenizer().save_pretrained(folder)
    loads = ("--cache", 3, "--requests", 3, "--prompt", 500, "--new", 6, "--batch", 2, "--context", 320)
    answer = commands.call("bench-vllm", "--model", folder, *loads, "--rounds", 1, "--out", out)
    assert answer.code == 0, answer.err
    found = json.loads(out.read_text())
    assert found["keeps"] == {"policy": "adakv:over=snapkv", "ratio": 0.25}
    rounds = {(each["load"], each["requests"]): each["rounds"] for each in found["found"]}
    assert len(rounds) == 6 and all(len(each) == 1 for each in rounds.values())
    at_once = {kind: rounds["short of memory", kind][0]["at_once"] for kind in ("stock", "plain", "compressed")}
    # 42 blocks of 32 tokens: two prompts, or all three when most of the first went.
    assert at_once == {"stock": 2, "plain": 2, "compressed": 3}
    assert all(rounds["memory to spare", kind][0]["steps"] for kind in at_once)
    assert "with headwise, compressed" in answer.out
