"""Tests inside vLLM, which has an environment of its own (`make test-vllm`); elsewhere they are not collected."""

from __future__ import annotations

import importlib.util

import engines
import pytest

collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Of a small model with random weights."""
    return engines.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def llm(folder):
    """The one engine of this process."""
    return engines.start(folder)


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """Of a small model that is spoken to in text."""
    import servers

    return servers.save_model(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def server(served, tmp_path_factory):
    """One that tests of clients share."""
    import servers

    forced = ("--logits-processors", "headwise.hosts.vllm.forced:Forced", "--max-logprobs", "4000")
    made = servers.Server(served, tmp_path_factory.mktemp("log") / "server.log", *forced)
    yield made
    made.stop()
