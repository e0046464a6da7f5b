"""LESS on the command line: folders of kernels, what is said of them, and what where there are none."""

from __future__ import annotations

import json

import pytest

import chatty
import headwise
from headwise.cli.main import main
from headwise.less.checkpoint import save_kernels
from less_oracle import kernels_of, networks_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return chatty.save(tmp_path_factory.mktemp("model"))


@pytest.fixture
def call(capsys, tmp_path, monkeypatch, folder):
    monkeypatch.setenv("HEADWISE_MODEL", str(folder))
    talker = chatty.model()
    save_kernels(kernels_of(talker, networks_of(talker)), tmp_path / "kernels")

    def run(*arguments):
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return left.value.code, captured.out, captured.err

    return run


SHORT = ("--prompt", chatty.TEXT, "--policy", "streamingllm", "--set", "window=6")
COMMANDS = {"generate": ("generate", *SHORT, "--max-new-tokens", 9), "profile": ("profile", *SHORT)}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_take_a_folder_of_kernels(call, tmp_path, command):
    code, out, err = call(*COMMANDS[command], "--less-kernels", tmp_path / "kernels", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["policy"]["name"] == "less"
    assert found["policy"]["parameters"]["policy"]["name"] == "streamingllm"
    assert found["policy"]["parameters"]["kernels"].startswith("<LESS kernels ")
    # Two layers, two KV heads, 4 features of 8 numbers and one more.
    assert found["memory"]["memory_bytes"] == 2 * 2 * 4 * 9 * 4
    assert found["memory"]["weight_bytes"] == headwise.load_kernels(tmp_path / "kernels").nbytes
    plain = json.loads(call(*COMMANDS[command], "--json")[1])
    assert set(plain["memory"]) == {"used_bytes", "allocated_bytes", "full_bytes"}
    assert found["memory"]["used_bytes"] == plain["memory"]["used_bytes"] + found["memory"]["memory_bytes"]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_say_what_is_remembered(call, tmp_path, monkeypatch, command):
    monkeypatch.setattr("headwise.policies.less.shipped_kernels", lambda: tmp_path / "kernels")
    code, out, err = call(*COMMANDS[command], "--less")
    assert code == 0
    told = err if command == "generate" else out
    assert "Less(StreamingLLM(window=6)" in told
    assert "remembered" in told
    assert "576 B of it for evicted tokens" in told
    assert "remembered" not in "".join(call(*COMMANDS[command])[1:])


@pytest.mark.parametrize("command", COMMANDS)
def test_without_kernels_a_command_says_so_before_it_loads_a_model(call, tmp_path, monkeypatch, command):
    monkeypatch.setenv("HEADWISE_MODEL", str(tmp_path / "nothing"))
    monkeypatch.setattr("headwise.policies.less.shipped_kernels", lambda: tmp_path / "none")
    for more in (("--less",), ("--less-kernels", tmp_path / "none")):
        code, _, err = call(*COMMANDS[command], *more)
        assert code == 2
        assert "error: no kernels of LESS in" in err
        assert "`headwise train-less` makes one" in err
