"""The bench with LESS: every cache that evicts runs a second time with kernels."""

from __future__ import annotations

import json
from functools import partial

import pytest

import tiny
from headwise.bench import bandwidth
from headwise.cli.main import main
from headwise.less.checkpoint import save_kernels
from less_oracle import FEATURES, kernels_of, networks_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model = tiny.llama(heads=4, kv_heads=2, layers=2, head_dim=8)
    model.save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    save_kernels(kernels_of(model, networks_of(model)), path / "kernels")
    return path


@pytest.fixture
def bench(capsys, monkeypatch):
    def call(*arguments):
        with pytest.raises(SystemExit) as left:
            main(["bench", *(str(argument) for argument in arguments)])
        return left.value.code, capsys.readouterr()

    # A buffer that the processor's cache holds: what it yields is not looked at.
    monkeypatch.setattr("headwise.bench.measure.measure_ceiling", partial(bandwidth.measure_ceiling, size=2**16))
    return call


def test_what_evicts_runs_once_more_and_holds_the_state_too(bench, folder):
    rounds = ("--context", 40, "--keep", "0.5", "--steps", 2, "--rounds", 1, "--evict-every", 2, "--quantized", "none")
    code, said = bench("--model", folder, *rounds, "--less-kernels", folder / "kernels", "--json")
    assert code == 0, said.err
    found = {m["name"]: m for m in json.loads(said.out)["results"][0]["candidates"]}
    assert list(found) == ["stock", "full", "keep 50%", "keep 50%, LESS"]
    assert found["keep 50%, LESS"]["setting"].startswith("Less(H2O(")
    used = {name: found[name]["after_decode"]["used_bytes"] for name in found if name != "stock"}
    # Of 2 layers and 2 KV heads: features times a value and its mass, in fp32.
    state = 2 * 2 * FEATURES * (8 + 1) * 4
    assert used["keep 50%, LESS"] - used["keep 50%"] == state


def test_random_weights_have_no_kernels(bench):
    code, said = bench("--shape", "tiny", "--less")
    assert code == 2
    assert "--less needs a model" in said.err
