"""`headwise train-less`: its folder, going on after an interruption, and requests that are refused."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import chatty
from headwise import HeadwiseCache, Less, StreamingLLM, load_kernels
from headwise.cli.main import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return chatty.save(tmp_path_factory.mktemp("tiny"), 256)


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"{chatty.TEXT} {number}" for number in range(60)), encoding="utf-8")
    return file


@pytest.fixture
def train_less(folder, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HEADWISE_MODEL", str(folder))

    def call(*more):
        small = ["--sequences=10", "--shortest=64", "--longest=100", "--rows=20", "--epochs=1", "--width=8"]
        small += ["--features=4"]
        policies = ["--policy", "streamingllm:window=9", "--policy", "h2o:heavy=5,recent=5"]
        with pytest.raises(SystemExit) as ended:
            main(["train-less", "--out", str(tmp_path / "out"), "--text", str(text), *small, *policies, *more])
        read = capsys.readouterr()
        return ended.value.code, read.out, read.err

    return call


def test_the_command_makes_a_folder_that_a_cache_takes(train_less, folder, tmp_path):
    code, out, err = train_less()
    assert code == 0, err
    assert "error without" in out
    kernels = load_kernels(tmp_path / "out")
    about = json.loads((tmp_path / "out" / "config.json").read_text())
    assert about["policies"] == ["streamingllm:window=9", "h2o:heavy=5,recent=5"]
    assert about["training"]["features"] == 4 and about["texts"][0]["sha256"]
    assert (
        sorted(about["layers"]) == [str(layer) for layer in range(chatty.LAYERS)]
        and len(kernels.layers) == chatty.LAYERS
    )
    assert not (tmp_path / "out" / "work").exists()
    model = AutoModelForCausalLM.from_pretrained(folder)
    code, _, err = train_less("--start", str(tmp_path / "out"), "--rate", "0")
    assert code == 0, err
    again = load_kernels(tmp_path / "out")
    assert again.about["start"]["digest"] == kernels.digest
    for name, tensor in again.layers[1].tensors().items():
        torch.testing.assert_close(tensor, kernels.layers[1].tensors()[name], atol=1e-3, rtol=1e-3)
    cache = HeadwiseCache(model, Less(StreamingLLM(window=9), tmp_path / "out"))
    ids = torch.arange(8, 50)[None]
    model.generate(ids, past_key_values=cache, max_new_tokens=3, do_sample=False)
    assert cache.headwise_layers[0].core.evicted_bytes > 0


def test_an_interrupted_command_goes_on_and_gives_the_same(train_less, tmp_path, monkeypatch):
    assert train_less()[0] == 0
    expected = (tmp_path / "out" / "kernels.safetensors").read_bytes()
    (tmp_path / "out" / "kernels.safetensors").unlink()
    import headwise.training.less.run as module

    real, calls = module.train, []

    def stops(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(module, "train", stops)
    code, _, err = train_less()
    assert code == 130 and "--resume" in err
    monkeypatch.setattr(module, "train", real)
    captured = []
    monkeypatch.setattr(module, "capture", lambda *_: captured.append(1))
    assert train_less()[0] == 2
    code, _, err = train_less("--resume")
    assert code == 0, err
    assert not captured
    assert (tmp_path / "out" / "kernels.safetensors").read_bytes() == expected


def test_bad_requests_are_refused_in_one_line(train_less, tmp_path):
    code, _, err = train_less("--store-limit", "1kB")
    assert code == 2 and "limit" in err and err.count("\n") == 1
    (tmp_path / "short.txt").write_text("too short")
    code, _, err = train_less("--shortest", "101")
    assert code == 2 and "longer than the longest" in err
    code, _, err = train_less("--text", str(tmp_path / "missing.txt"))
    assert code == 2 and "no file" in err


def test_another_run_is_not_gone_on_with(train_less, tmp_path, monkeypatch):
    import headwise.training.less.run as module

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "train", stop)
    assert train_less()[0] == 130
    code, _, err = train_less("--resume", "--seed", "5")
    assert code == 2 and "other options" in err


def test_too_many_sequences_for_the_limit_say_how_many_fit(train_less):
    _, _, err = train_less("--store-limit", "100kB")
    assert "or fewer" in err
