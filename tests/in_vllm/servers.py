"""vLLM's OpenAI server in a process of its own, with a small random model that is spoken to in text."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import engines
import openai

import chatty
from headwise.hosts.vllm import metrics

KEEPS = {"headwise_policy": "adakv:over=snapkv", "headwise_ratio": 0.25}
TEXT = (
    " ".join(f"The {word} sat on the {other}." for word in ("cat", "dog", "log") for other in ("mat", "log", "dog"))
    * 12
)


def save_model(folder):
    engines.save_model(folder, len(chatty.tokenizer()))
    chatty.tokenizer().save_pretrained(folder)
    return folder


class Server:
    """One that runs until it is stopped."""

    def __init__(self, folder, log: Path, *more, **environment):
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
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words, "--enforce-eager", *more]
        given = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **environment}
        # That of an engine in this process.
        given.pop(metrics.FOLDER, None)
        with log.open("w") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out, env=given, start_new_session=True)
        until = time.monotonic() + 300
        while not self.ready():
            assert self.process.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(0.5)
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

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
