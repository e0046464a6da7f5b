"""vLLM's OpenAI server with headwise installed, asked by the openai package: one round trip of everything."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import engines
import openai
import psutil
import pytest

import chatty
from headwise.hosts.vllm import metrics

KEEPS = {"headwise_policy": "adakv:over=snapkv", "headwise_ratio": 0.25}
TEXT = (
    " ".join(f"The {word} sat on the {other}." for word in ("cat", "dog", "log") for other in ("mat", "log", "dog"))
    * 12
)


class Server:
    """One that runs until it is stopped."""

    def __init__(self, folder, log: Path, **environment):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        options = {
            "--model": folder,
            "--served-model-name": "small",
            "--port": self.port,
            "--host": "127.0.0.1",
            "--dtype": "float32",
            "--block-size": engines.BLOCK,
            "--kv-cache-memory-bytes": 16 * 2**20,
            "--max-model-len": 4096,
        }
        words = [str(word) for pair in options.items() for word in pair]
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words, "--enforce-eager"]
        given = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **environment}
        # That of an engine in this process.
        given.pop(metrics.FOLDER, None)
        with log.open("w") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out, env=given, start_new_session=True)
        until = time.monotonic() + 300
        while not self.ready():
            assert self.process.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(0.5)
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0)

    def get(self, path):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
            return answer.read().decode()

    def ready(self):
        try:
            self.get("/health")
        except OSError:
            return False
        return True

    def complete(self, prompt=TEXT, keeps=None, **options):
        given = {"model": "small", "prompt": prompt, "max_tokens": 12, "temperature": 0, "logprobs": 1} | options
        beside = {"ignore_eos": True, **({"vllm_xargs": keeps} if keeps else {})}
        return self.client.completions.create(**given, extra_body=beside)

    def stop(self):
        os.killpg(self.process.pid, signal.SIGINT)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(10)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    engines.save_model(folder, len(chatty.tokenizer()))
    chatty.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(served, tmp_path_factory):
    made = Server(served, tmp_path_factory.mktemp("log") / "server.log")
    yield made
    made.stop()


def test_completions_with_and_without(server):
    plain, compressed, whole = (
        server.complete(),
        server.complete(keeps=KEEPS),
        server.complete(keeps={**KEEPS, "headwise_ratio": 1}),
    )
    assert plain.usage.prompt_tokens > 300
    # The first comes of the pass that reads the prompt.
    first = [each.choices[0].logprobs.token_logprobs[0] for each in (plain, compressed, whole)]
    assert first == pytest.approx([first[0]] * 3, abs=1e-4)
    assert whole.choices[0].text == plain.choices[0].text != compressed.choices[0].text
    assert server.complete().choices[0].text == plain.choices[0].text


def test_streams_chats_and_many_at_once(server):
    whole = server.complete(keeps=KEEPS).choices[0].text
    assert "".join(part.choices[0].text for part in server.complete(keeps=KEEPS, stream=True)) == whole
    told = [{"role": "user", "content": TEXT}]
    answer = server.client.chat.completions.create(
        model="small", messages=told, max_tokens=4, extra_body={"vllm_xargs": KEEPS}
    )
    assert answer.usage.completion_tokens == 4
    with ThreadPoolExecutor(12) as many:
        ratios = [0.25, 0.5, None] * 8
        found = list(
            many.map(lambda ratio: server.complete(keeps=ratio and {**KEEPS, "headwise_ratio": ratio}), ratios)
        )
    texts = [{each.choices[0].text for each in found[start::3]} for start in range(3)]
    assert texts[0] == {whole} and all(len(each) == 1 for each in texts)


def test_metrics_stand_beside_those_of_vllm(server):
    server.complete(keeps=KEEPS)
    told = server.get("/metrics")
    assert "vllm:num_requests_running" in told
    for name in ("requests", "blocks_kept", "blocks_freed", "choosing_seconds"):
        (line,) = [each for each in told.splitlines() if each.startswith(f"headwise:{name}_total")]
        assert 'policy="adakv"' in line and float(line.split()[-1]) > 0
    assert "headwise:kept_ratio 0." in told


@pytest.mark.parametrize(
    ("keeps", "why"),
    [
        ({"headwise_policy": "snapkw"}, "did you mean snapkv"),
        ({"headwise_policy": "fastgen"}, "known only when the prompt was read"),
        ({"headwise_ratio": 0}, "ratio must be above 0"),
        ({"headwise_ratios": 0.5}, "has no 'headwise_ratios'"),
        ({"headwise": "on"}, "is an object such as"),
    ],
)
def test_what_cannot_be_is_answered_with_400(server, keeps, why):
    with pytest.raises(openai.BadRequestError, match=why) as found:
        server.complete(keeps=keeps)
    assert found.value.status_code == 400
    assert server.complete(max_tokens=1).choices[0].text is not None


def test_a_default_for_all_and_a_worker_that_dies(served, tmp_path, server):
    """A request may change it, or do without; when a process is killed, the server says so."""
    whole, kept = (server.complete(keeps=keeps).choices[0].text for keeps in (None, KEEPS))
    default = json.dumps({"policy": KEEPS["headwise_policy"], "ratio": KEEPS["headwise_ratio"]})
    other = Server(served, tmp_path / "log", HEADWISE_VLLM_DEFAULT=default)
    try:
        assert other.complete().choices[0].text == kept
        assert other.complete(keeps={"headwise": "off"}).choices[0].text == whole
        assert other.complete(keeps={"headwise_ratio": 1}).choices[0].text == whole
        workers = [
            each for each in psutil.Process(other.process.pid).children(recursive=True) if "Worker" in each.name()
        ]
        assert workers
        with ThreadPoolExecutor(1) as one:
            asked = one.submit(lambda: other.complete(max_tokens=3000, logprobs=None))
            time.sleep(1)
            for worker in workers:
                worker.kill()
            with pytest.raises((openai.APIStatusError, openai.APIConnectionError)):
                asked.result(60)
    finally:
        other.stop()
