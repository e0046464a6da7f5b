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
