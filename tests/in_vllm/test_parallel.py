"""Heads spread over two processes (tensor parallel): each has its own, and its part of every block."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import engines


def answers(folder, processes, *policies):
    command = [sys.executable, str(Path(__file__).with_name("parallel.py")), str(folder), str(processes), *policies]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_two_processes_write_what_one_does(tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "HEADS", 8)
    monkeypatch.setattr(engines, "KV_HEADS", 4)
    folder = engines.save_model(tmp_path)
    # By the scores of each head alone, which are the same wherever it is; AdaKV shares among the heads of a process.
    alone = ("snapkv:window=16", "h2o", "keydiff", "streamingllm")
    one, two = (answers(folder, processes, *alone, "adakv:over=snapkv") for processes in (1, 2))
    assert {policy: two[policy] for policy in alone} == {policy: one[policy] for policy in alone}
    assert len(two["adakv:over=snapkv"][0]) == 20
