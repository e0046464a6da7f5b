"""The benchmark beside vLLM alone, without vLLM: engines in turn, medians, and what is said where there is none."""

from __future__ import annotations

import json
import subprocess
from types import SimpleNamespace

import pytest

import commands
from headwise.bench import vllm_rounds
from headwise.bench.vllm_rounds import COMPRESSED, PLAIN, STOCK, Asked, EngineError, Load, run, summary

ASKED = Asked("folder", [1, 2, 3], {"policy": "tova"}, "float32", 32, [Load("a", 8, 2, 100, 4)], 3)


def test_engines_take_turns(monkeypatch):
    calls, told = [], []

    def answer(command, input, env, **_):
        calls.append((json.loads(input), env.get("VLLM_PLUGINS")))
        return SimpleNamespace(stdout='{"n": 1}', stderr="")

    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.setattr(subprocess, "run", answer)
    found = list(run(ASKED, told.append))
    kinds = [STOCK, COMPRESSED, PLAIN]
    assert [kind for _, kind, _ in found] == [*kinds, *kinds[1:], STOCK, PLAIN, STOCK, COMPRESSED]
    for (_, kind, _), (words, plugins) in zip(found, calls, strict=True):
        assert plugins == ("" if kind == STOCK else None)
        assert words["load"]["extra"] == ({"headwise": {"policy": "tova"}} if kind == COMPRESSED else None)
        assert words["engine"]["kv_cache_memory_bytes"] == 8 * 2**20
    assert told[0] == "round 1 of 3: a, stock" and len(told) == 9
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="", stderr="no room"))
    with pytest.raises(EngineError, match="no room"):
        next(vllm_rounds.run(ASKED, told.append))


def test_medians_over_rounds():
    rounds = [
        {
            "seconds": s,
            "tokens_per_second": 1 / s,
            "usage": 0.5,
            "at_once": at,
            "preemptions": at - 4,
            "first_token": [1.0, s, 9.0],
            "per_token": [s],
            "steps": steps,
        }
        for s, at, steps in ((2.0, 4, [1.0]), (4.0, 6, [3.0, 5.0]), (8.0, 5, []))
    ]
    found = summary(rounds)
    assert found["seconds"] == found["first_token"] == found["per_token"] == 4.0
    assert (found["tokens_per_second"], found["at_once"], found["preemptions"], found["step"]) == (0.25, 6, 2, 3.0)
    assert summary(rounds[2:])["step"] is None


def test_without_vllm():
    commands.assert_one_line(commands.call("bench-vllm"), "vLLM is not installed here: pip install 'headwise[vllm]'")
