"""Caches in another interpreter: the questions, the answers, and what goes wrong."""

from __future__ import annotations

import contextlib
import json
import sys
import types

import pytest
import torch
from benching import ROUNDS, ROW, STEPS, TINY, Fake, bench, run_by_hand, small
from transformers import DynamicCache, LlamaForCausalLM

import tiny
from headwise.bench import contenders, kvpress_worker, models, run, workload
from headwise.bench.kvpress_process import KvpressError, KvpressProcess, KvpressRun
from headwise.bench.record import Record

# The other process.


def asked(python):
    return [json.loads(line) for line in python.with_name("python.log").read_text().splitlines()]


def test_kvpress_process_takes_its_turn_with_the_same_tokens(fake_python):
    python = fake_python()
    found = bench(*small("--kvpress", python, "--kvpress-press", "SomePress", "--json")).json
    candidate = found["results"][0]["candidates"][-1]
    assert candidate["name"] == "kvpress 50%"
    assert candidate["round_seconds"] == [0.5] * ROUNDS
    assert candidate["prefill"]["seconds"] == 2.0
    assert candidate["after_prompt"] == {"used_bytes": 100, "allocated_bytes": 128, "kept_ratio": 0.25}
    assert found["versions"]["peer: kvpress"] == "9.9"
    requests = asked(python)
    assert [request["do"] for request in requests] == ["load", "prefill", "decode", "prefill", *["decode"] * 3, "drop"]
    load, _, _, prefill, *rest = requests
    assert load["config"]["num_hidden_layers"] == TINY.layers
    assert (load["dtype"], load["device"], load["threads"]) == ("float32", "cpu", torch.get_num_threads())
    assert (prefill["press"], prefill["keep"]) == ("SomePress", 0.5)
    fed = torch.cat([torch.tensor(request["ids"]) for request in [prefill, *rest[:-1]]], dim=1)
    assert torch.equal(fed, workload.random_ids(TINY.vocabulary, 1, 24 + STEPS * (ROUNDS + 2))[:, : fed.shape[1]])


def test_kvpress_process_gets_the_folder_of_a_model(fake_python, folder):
    python = fake_python()
    model = LlamaForCausalLM.from_pretrained(folder)
    process = KvpressProcess(str(python))
    assert run._load(process, run.BenchModel(model, tiny.tokenizer()), Record(), lambda _: None) is None
    process.close()
    assert asked(python)[0]["folder"] == str(folder)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("prefill", {"error": "AssertionError: too short"}), "AssertionError: too short"),
        (("prefill", {"error": "no", "out_of_memory": True}), "out of memory"),
        (("prefill", "hello"), "an answer that is none: 'hello'"),
        (("", None, "die"), "ended: so long"),
    ],
    ids=["cannot read", "too large", "talks nonsense", "dies"],
)
def test_kvpress_process_that_fails_is_left_out(fake_python, options, says):
    process = KvpressProcess(str(fake_python(*options)))
    result, _ = run_by_hand(Fake("stock", []), KvpressRun(contenders.kvpress("P", 0.5), process))
    process.close()
    assert says in result.measurements[1].failure
    assert result.measurements[0].round_seconds == [3.0, 4.0]


def test_kvpress_process_that_does_not_end_by_itself_is_ended(tmp_path):
    path = tmp_path / "python"
    path.write_text(f"#!{sys.executable}\nimport time\ntime.sleep(60)\n")
    path.chmod(0o755)
    process = KvpressProcess(str(path))
    started = process._process
    process.close(patience=0.1)
    assert started.poll() is not None


class KeepHalf:
    """A press, as far as the worker needs one: hooks every attention layer and keeps the newest of the prompt."""

    def __init__(self, compression_ratio):
        self.share = 1 - compression_ratio

    @contextlib.contextmanager
    def __call__(self, model):
        def press(module, args, kwargs, output):
            layer = kwargs["past_key_values"].layers[module.layer_idx]
            rows = round(layer.keys.shape[2] * self.share)
            layer.keys, layer.values = layer.keys[:, :, -rows:].clone(), layer.values[:, :, -rows:].clone()

        layers = model.get_decoder().layers
        hooks = [layer.self_attn.register_forward_hook(press, with_kwargs=True) for layer in layers]
        yield
        for hook in hooks:
            hook.remove()


@pytest.fixture
def worker(monkeypatch):
    module = types.ModuleType("kvpress")
    module.KeepHalf = KeepHalf
    monkeypatch.setitem(sys.modules, "kvpress", module)
    version = kvpress_worker.metadata.version
    monkeypatch.setattr(kvpress_worker.metadata, "version", lambda name: "9.9" if name == "kvpress" else version(name))
    made = kvpress_worker.Worker()
    config = models.llama_dimensions(TINY)
    asked = {"do": "load", "config": config, "dtype": "float32", "device": "cpu", "threads": torch.get_num_threads()}
    assert kvpress_worker.answer(made, asked)["kvpress"] == "9.9"
    return made


def test_worker_presses_the_prompt_and_goes_on_at_its_end(worker):
    ids = workload.random_ids(TINY.vocabulary, 2, 26)
    read = {"do": "prefill", "name": "a", "ids": ids[:, :20].tolist(), "repeats": 1, "press": "KeepHalf", "keep": 0.5}
    found = kvpress_worker.answer(worker, read)
    rows = 2 * TINY.layers * TINY.kv_heads
    assert (found["used_bytes"], found["allocated_bytes"], found["kept_ratio"]) == (
        rows * 10 * ROW,
        rows * 10 * ROW,
        0.5,
    )
    kvpress_worker.answer(worker, {**read, "name": "b", "keep": 1.0})
    for name in "ab":
        found = kvpress_worker.answer(worker, {"do": "decode", "name": name, "ids": ids[:, 20:].tolist()})
        assert found["seconds"] > 0
    assert found["kept_ratio"] == 1.0
    # What keeps everything decodes as stock does: every token at its own position.
    cache = DynamicCache()
    with torch.inference_mode():
        worker.model(input_ids=ids, past_key_values=cache)
    held, _ = worker.caches["b"]
    torch.testing.assert_close(held.layers[-1].keys, cache.layers[-1].keys)
    held, seen = worker.caches["a"]
    assert (seen, held.layers[0].keys.shape[2]) == (26, 16)
    torch.testing.assert_close(held.layers[0].keys, cache.layers[0].keys[:, :, 10:])
    assert kvpress_worker.answer(worker, {"do": "drop", "name": "a"}) == {}
    assert list(worker.caches) == ["b"]


def test_worker_repeats_sequences(worker):
    read = {"do": "prefill", "name": "a", "ids": [[1, 2, 3, 4]], "repeats": 3, "press": "KeepHalf", "keep": 0.5}
    kvpress_worker.answer(worker, read)
    assert worker.caches["a"][0].layers[0].keys.shape[0] == 3
    assert kvpress_worker.answer(worker, {"do": "decode", "name": "a", "ids": [[1], [1], [1]]})["seconds"] > 0


def test_worker_says_what_went_wrong(worker):
    found = kvpress_worker.answer(worker, {"do": "prefill", "ids": [[1]], "press": "NoPress", "keep": 0.5})
    assert found["error"].startswith("AttributeError: ")
    assert not found["out_of_memory"]


def test_a_run_of_kvpress_closes_only_its_cache(fake_python):
    python = fake_python()
    process = KvpressProcess(str(python))
    KvpressRun(contenders.kvpress("P", 0.5), process).close()
    assert process.load({"folder": "here"}, torch.bfloat16, torch.device("cpu")) == {"kvpress": "9.9"}
    process.close()
    assert [request["do"] for request in asked(python)] == ["drop", "load"]
    with pytest.raises(KvpressError):
        process.ask("load")


def test_kvpress_process_that_is_broken_off_is_not_waited_for(tmp_path, monkeypatch):
    path = tmp_path / "python"
    path.write_text(f"#!{sys.executable}\nimport time\ntime.sleep(60)\n")
    path.chmod(0o755)
    process = KvpressProcess(str(path))
    silent = types.SimpleNamespace(readline=interrupt, close=process._process.stdout.close)
    monkeypatch.setattr(process._process, "stdout", silent)
    with pytest.raises(KeyboardInterrupt):
        process.ask("decode")
    # Neither asked for more nor given time to end.
    done, kill, wait = [], process._process.kill, process._process.wait
    monkeypatch.setattr(process._process, "kill", lambda: (done.append("kill"), kill()))
    monkeypatch.setattr(process._process, "wait", lambda **_: (done.append("wait"), wait(timeout=20)))
    KvpressRun(contenders.kvpress("P", 0.5), process).close()
    process.close()
    assert done == ["kill", "wait"]
    assert process._process.returncode == -9


def interrupt():
    raise KeyboardInterrupt
