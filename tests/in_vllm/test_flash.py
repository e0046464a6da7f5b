"""What is meant for GPUs, in a whole engine: FlashAttention's backend and layout, with its kernels in plain torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import flash_engine
import pytest

from headwise.hosts.vllm import engine


def test_it_writes_what_the_backend_for_cpus_does(llm, folder):
    command = [sys.executable, str(Path(flash_engine.__file__)), str(folder)]
    paths = [str(Path(flash_engine.__file__).parent), str(Path(flash_engine.__file__).parents[1])]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env={**flash_engine.environment(), "PYTHONPATH": ":".join(paths)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["attends"] == "HeadwiseFlashImpl"
    assert found["new"] == flash_engine.answers(llm)


@pytest.mark.parametrize(
    ("cuda", "asked", "backend", "why"),
    [
        (True, None, "FLASH_ATTN", "HEADWISE_VLLM_GPU=1 has it tried"),
        (False, "1", "FLASH_ATTN", "HEADWISE_VLLM_GPU=1 has it tried"),
        (True, "1", "FLASHINFER", "--attention-backend FLASH_ATTN"),
        (True, "1", None, "--attention-backend FLASH_ATTN"),
        (True, "1", "FLASH_ATTN", None),
    ],
)
def test_engines_on_gpus_have_to_ask_for_it(cuda, asked, backend, why, monkeypatch):
    platform = SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: cuda)
    monkeypatch.setattr(engine, "current_platform", platform)
    monkeypatch.delenv(engine.GPU, raising=False)
    if asked is not None:
        monkeypatch.setenv(engine.GPU, asked)
    chosen = None if backend is None else SimpleNamespace(name=backend)
    found = engine.gpu_obstacle(SimpleNamespace(attention_config=SimpleNamespace(backend=chosen)))
    assert found is None if why is None else why in found
