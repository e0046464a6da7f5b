"""What `headwise eval` finds out through a server, against the same evaluation with transformers here."""

from __future__ import annotations

import json

import pytest
import torch
from servers import TEXT

from headwise.cli.main import main
from headwise.errors import ConfigurationError
from headwise.eval.server import Server
from headwise.hosts.vllm.options import Options

# As many rows of every head as fill pages, so that the same rows stay here and there.
SAME = "snapkv:keep=0.25,window=16,of=prompt"
SHARED = "adakv:over=snapkv,keep=0.25,of=prompt"


@pytest.fixture
def evaluate(served, server, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"{number} {TEXT}" for number in range(12)))

    def run(kind, *words, through=True):
        given = ["--text", str(text), "--model", str(served), "--dtype", "float32", "-o", str(tmp_path / f"{through}")]
        given += [*words, "--json"]
        with pytest.raises(SystemExit) as left:
            main(["eval", kind, *given, *(("--server", f"{server.url}/v1") if through else ("--kernel", "reference"))])
        told = capsys.readouterr()
        assert left.value.code in (0, None), told.err
        return json.loads(told.out)

    return run


def rows(results):
    return {row["policy"]: row for row in results["summaries"][0]["rows"]}


def test_predictions_are_as_far_off_as_here(evaluate):
    words = ("--context", "512", "--steps", "24", "--passages", "2", "--policy", SAME, "--policy", SHARED)
    there, here = (rows(evaluate("fidelity", *words, through=through)) for through in (True, False))
    assert there["full"]["metrics"]["kl"]["mean"] == pytest.approx(0, abs=1e-5)
    assert there[SAME]["metrics"]["kl"]["mean"] > 0.01
    for metric in ("kl", "nll_change", "top1"):
        found, wanted = (each[SAME]["metrics"][metric]["mean"] for each in (there, here))
        assert found == pytest.approx(wanted, abs=2e-4)
    assert there[SAME]["kept_ratio"] == here[SAME]["kept_ratio"] == 0.25
    assert there[SAME]["used_bytes"] * 4 == there[SAME]["full_bytes"] == here[SAME]["full_bytes"]
    # Rounded to whole pages, it is another choice, and as large.
    assert there[SHARED]["kept_ratio"] == 0.25
    assert there[f"random, size of {SHARED}"]["kept_ratio"] == pytest.approx(0.25)
    assert there[SHARED]["compress_seconds"] > 0 and there["full"]["compress_seconds"] == 0
    assert there[SHARED]["prefill_seconds"] > there[SHARED]["compress_seconds"]


def test_answers_are_those_from_here(evaluate):
    words = ("--context", "480", "--items", "3", "--query", "agnostic", "--policy", SAME, "--no-random")
    there, here = (evaluate("recall", *words, through=through) for through in (True, False))
    assert there["configuration"]["source"]["server"] and there["machine"]["block_size"] == 32
    assert "vllm" in there["versions"]
    answers = [
        {(u["item"], u["policy"]): u["details"]["answer"] for u in results["units"]} for results in (there, here)
    ]
    full = [{key: text for key, text in each.items() if key[1] == "full"} for each in answers]
    assert full[0] == full[1] and len(full[0]) == 3


def test_what_is_written_is_what_was_told(server, served):
    import chatty

    asked = Server(server.url, chatty.tokenizer(), len(chatty.tokenizer()), set())
    prompt = chatty.tokenizer()(TEXT)["input_ids"]
    free = asked.write(prompt, 8, Options("snapkv:window=16", 0.5), rows=True)
    forced = [(free.ids[0] + 1) % 200, *free.ids[:2]]
    told = asked.write(prompt, 8, Options("snapkv:window=16", 0.5), forced, rows=True)
    assert told.ids[:3] == forced and len(told.ids) == 8
    # The model's own opinion, whatever it was made to write.
    torch.testing.assert_close(told.rows[0], free.rows[0])
    assert int(told.rows[0].argmax()) == free.ids[0] != told.ids[0]
    torch.testing.assert_close(told.rows.exp().sum(dim=1), torch.ones(8))
    with pytest.raises(ConfigurationError, match="forced_ids must be a list of token ids"):
        list(asked._stream({"prompt": [1], "max_tokens": 1, "vllm_xargs": {"forced_ids": ["a"]}}))


def test_several_are_told_different_things_at_once(server):
    from concurrent.futures import ThreadPoolExecutor

    import chatty

    asked = Server(server.url, chatty.tokenizer(), len(chatty.tokenizer()), set())
    texts = [[start, *range(40, 40 + length)] for start, length in ((50, 3), (60, 0), (70, 9), (80, 5), (90, 1))]
    with ThreadPoolExecutor(5) as many:
        found = list(many.map(lambda text: asked.write([1, 2, 3], 12, None, text), texts))
    assert all(each.ids[: len(text)] == text for each, text in zip(found, texts, strict=True))
