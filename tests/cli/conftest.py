"""What the tests of the command line have in common: a tiny model in a folder, and a command that finds it there."""

from __future__ import annotations

import pytest
from asking import POSITIONS, short

import chatty
import commands


@pytest.fixture(scope="session")
def tokenizer():
    # Bytes: what a random model writes is mostly not UTF-8, and streaming must cope.
    return chatty.tokenizer()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return chatty.save(tmp_path_factory.mktemp("tiny"), POSITIONS)


@pytest.fixture
def headwise(folder, monkeypatch):
    """A command, whose default model is the tiny one."""
    monkeypatch.setenv("HEADWISE_MODEL", str(folder))
    return commands.call


@pytest.fixture(scope="session")
def told(folder):
    """What `short("--json")` tells; it is always the same but for the times."""
    answer = commands.call(*short("--json", "--model", folder))
    assert (answer.code, answer.err) == (0, "")
    return answer.json


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "document.txt"
    path.write_text(chatty.TEXT, encoding="utf-8")
    return path
