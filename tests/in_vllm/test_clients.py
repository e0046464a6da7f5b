"""Programs that servers are measured with, asking for compression: lm-evaluation-harness and vLLM's benchmark."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from servers import KEEPS, TEXT

pytestmark = pytest.mark.filterwarnings("ignore")
PROMPTS = [f"{number}: {TEXT}" for number in range(3)]


def run(*command):
    found = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-3000:]
    return found.stdout


def counted(server):
    lines = [line for line in server.get("/metrics").splitlines() if line.startswith("headwise:requests_total")]
    return sum(float(line.split()[-1]) for line in lines)


@pytest.mark.parametrize("keeps", [None, KEEPS])
def test_the_harness_is_given_what_is_written_on_what_stays(server, served, tmp_path, keeps):
    texts = [server.complete(prompt, keeps=keeps).choices[0].text for prompt in PROMPTS]
    # The first is expected to be said, the others are not.
    lines = [{"text": prompt, "answer": texts[0]} for prompt in PROMPTS]
    (tmp_path / "lines.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    task = {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "lines.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["<|im_end|>"], "max_gen_toks": 12, "temperature": 0},
        "metric_list": [{"metric": "exact_match"}],
    }
    (tmp_path / "tiny.yaml").write_text(json.dumps(task))
    before = counted(server)
    given = {"model": "small", "base_url": f"{server.url}/v1/completions", "tokenizer": served, "num_concurrent": 2}
    words = ["--model", "local-completions", "--model_args", ",".join(f"{k}={v}" for k, v in given.items())]
    words += ["--tasks", "tiny", "--include_path", tmp_path, "--output_path", tmp_path / "out", "--log_samples"]
    words += ["--gen_kwargs", json.dumps({"vllm_xargs": keeps, "ignore_eos": True})] if keeps else []
    run("-m", "lm_eval", *words)
    (record,) = (tmp_path / "out").rglob("samples_*.jsonl")
    samples = [json.loads(line) for line in record.read_text().splitlines()]
    said = {sample["doc"]["text"]: sample["filtered_resps"][0] for sample in samples}
    assert [said[prompt] for prompt in PROMPTS] == texts
    assert counted(server) - before == (3 if keeps else 0)


def test_the_benchmark_of_vllm_asks_for_compression(server, served, tmp_path):
    before = counted(server)
    # The command itself looks for a package of the name vllm, which the one for CPUs has not.
    code = (
        "import argparse; from vllm.benchmarks.serve import add_cli_args, main;"
        "parser = argparse.ArgumentParser(); add_cli_args(parser); main(parser.parse_args())"
    )
    words = ["--backend", "openai", "--base-url", server.url, "--model", "small", "--tokenizer", served]
    words += ["--dataset-name", "random", "--random-input-len", 300, "--random-output-len", 8, "--num-prompts", 6]
    words += ["--extra-body", json.dumps({"vllm_xargs": KEEPS}), "--save-result", "--result-dir", tmp_path]
    run("-c", code, *words)
    (record,) = tmp_path.glob("*.json")
    found = json.loads(record.read_text())
    assert (found["completed"], found["total_output_tokens"]) == (6, 48)
    # One more is sent to see whether anybody answers.
    assert counted(server) - before in (6, 7)
