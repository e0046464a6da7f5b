"""Training of all layers of LESS together: traces, what is predicted with them, what it learns, and the command."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch
from transformers.cache_utils import StaticLayer

import chatty
import headwise.training.less.jointly as module
from headwise import HeadwiseCache, Less, StreamingLLM, UnsupportedModelError, load_kernels
from headwise.cli.main import main
from headwise.contract import LayerShape
from headwise.less.features import LayerFeatures, LessKernels
from headwise.policies import H2O, FastGen, KVzip, SnapKV
from headwise.training.less.jointly import JointOptions, divergence, loss, train_jointly
from headwise.training.less.one_layer import TrainableFeatures
from headwise.training.less.record_trace import _past, record_trace
from headwise.training.less.replay import predict
from headwise.training.less.trace import EvictionTrace, trace_bytes
from headwise.weights import sample_weights
from models import full_layers, prompt, shared
from tiny import tokenizer

PROMPT, FED = 37, 29
STREAMING = StreamingLLM(window=9, sinks=2)
POLICIES = [STREAMING, H2O(heavy=5, recent=4), FastGen(recovery=0.3), SnapKV(keep=7, window=3), KVzip(keep=6)]


def random_kernels(family, seed=1):
    model = shared(family)
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    torch.manual_seed(seed)
    layers = {}
    for index in full_layers(family):
        made = TrainableFeatures(heads, config.num_attention_heads // heads, dim, 12, 5)
        with torch.no_grad():
            made.scale.uniform_(0.05, 1.05)
            made.gain.normal_()
        layers[index] = LayerFeatures(**{name: tensor.detach() for name, tensor in made.folded().tensors().items()})
    return LessKernels(layers, {"policies": [policy.name for policy in POLICIES]}, sample_weights(model))


def trace_of(family="llama", policy=STREAMING, kernels=None, seed=0):
    wrapped = Less(policy, random_kernels(family) if kernels is None else kernels)
    return record_trace(shared(family), tokenizer(), wrapped, prompt(PROMPT + FED, seed), PROMPT)


@torch.no_grad()
def in_use(model, policy, ids):
    """Predictions of a cache that is fed token by token."""
    cache = HeadwiseCache(model, policy, tokenizer=tokenizer(), prompt_tokens=PROMPT)
    model(input_ids=ids[:, :PROMPT], past_key_values=cache)
    steps = [model(input_ids=token, past_key_values=cache).logits[0] for token in ids[:, PROMPT:].split(1, dim=1)]
    return torch.cat(steps).log_softmax(dim=-1)


# What a trace is, and what is predicted with it.

CASES = [("llama", policy) for policy in POLICIES] + [(family, STREAMING) for family in ("qwen3", "gemma3", "gpt-oss")]


@pytest.mark.parametrize(("family", "policy"), CASES, ids=lambda case: getattr(case, "name", case))
def test_the_student_predicts_what_the_cache_in_use_does(family, policy):
    """All tokens at once, against the product token by token: what is kept, forgotten and remembered is the same."""
    model, ids, kernels = shared(family), prompt(PROMPT + FED), random_kernels(family)
    trace = trace_of(family, policy, kernels)
    with torch.no_grad():
        remembering = predict(model, trace, kernels.layers)
        without = predict(model, trace_of(family, STREAMING, kernels), {})
    torch.testing.assert_close(remembering, in_use(model, Less(policy, kernels), ids), atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(without, in_use(model, STREAMING, ids), atol=2e-4, rtol=2e-4)
    assert float((remembering - without).abs().max()) > 0.1


@pytest.mark.shapes
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt-oss"])
def test_where_nothing_goes_the_student_is_the_model(family):
    model, ids = shared(family), prompt(PROMPT + FED)
    trace, kernels = trace_of(family), random_kernels(family)
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0, PROMPT:].log_softmax(dim=-1)
        kept = predict(model, trace.without_evictions(), kernels.layers)
    torch.testing.assert_close(trace.full, expected, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(kept, expected, atol=2e-4, rtol=2e-4)


def test_a_trace_knows_when_every_column_goes():
    trace = trace_of()
    assert (trace.prompt, trace.every, trace.ids.shape) == (PROMPT, 16, (1, FED))
    assert trace.stages.tolist() == [0] * 16 + [1] * 13
    # Two sinks and nine of a window stay after the prompt, and sixteen tokens later the window has moved by as many.
    expected = [2] * 2 + [0] * 26 + [1] * 16 + [2] * 22
    for gone in trace.gone.values():
        assert gone.tolist() == [expected] * 2


@pytest.mark.shapes
def test_a_trace_comes_back_from_its_file(tmp_path):
    trace = trace_of()
    file = tmp_path / "trace.safetensors"
    trace.save(file)
    again = EvictionTrace.load(file, torch.device("cpu"), torch.float32)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    for field in fields(EvictionTrace):
        ours, theirs = getattr(again, field.name), getattr(trace, field.name)
        torch.testing.assert_close(ours, theirs, atol=0.01, rtol=1e-3)
    config = shared("llama").config
    size = trace_bytes(PROMPT, FED, [LayerShape(2, 16, 16)] * config.num_hidden_layers, config.vocab_size)
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size - header == size


def test_a_layer_that_holds_something_else_is_refused():
    with pytest.raises(UnsupportedModelError, match="StaticLayer"):
        _past(StaticLayer(max_cache_len=8))


# What is learnt.


def test_the_loss_counts_the_first_nat_of_a_prediction_more_than_the_next():
    full = torch.tensor([[0.5, 0.5], [1 - 1e-9, 1e-9]]).log()
    ours = torch.tensor([[0.25, 0.75], [0.01, 0.99]]).log()
    apart = [0.5 * math.log(2) + 0.5 * math.log(2 / 3), math.log(100)]
    torch.testing.assert_close(divergence(full, ours), torch.tensor(apart), atol=1e-5, rtol=1e-5)
    expected = (math.log1p(apart[0]) + math.log1p(apart[1])) / 2
    torch.testing.assert_close(loss(full, ours), torch.tensor(expected), atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    """Kernels with which a memory has hardly any effect, and traces to learn from and to check with."""
    folder, kernels = tmp_path_factory.mktemp("traces"), random_kernels("llama")
    for layer in kernels.layers.values():
        layer.key_mix.mul_(0.1)
    paths = [folder / f"{number}.safetensors" for number in range(10)]
    for number, path in enumerate(paths):
        trace_of(policy=POLICIES[number % 2], kernels=kernels, seed=number).save(path)
    return kernels.layers, paths[:8], paths[8:]


def learnt(traces, state, **options):
    start, learns, checks = traces
    told = []
    chosen = JointOptions(**{"epochs": 2, "batch": 2, "rate": 1e-2, **options})
    result = train_jointly(shared("llama"), start, learns, checks, chosen, state, lambda *done: told.append(done))
    return result, told


def mean_divergence(traces, kernels):
    read = [EvictionTrace.load(path, torch.device("cpu"), torch.float32) for path in traces[2]]
    with torch.no_grad():
        found = [divergence(trace.full, predict(shared("llama"), trace, kernels)).mean() for trace in read]
    return float(sum(found) / len(found))


def test_what_is_learnt_brings_predictions_closer_on_passages_it_has_not_seen(traces, tmp_path):
    model = shared("llama")
    before = sample_weights(model)
    result, told = learnt(traces, tmp_path / "state.pt", epochs=4, batch=1)
    assert told == [(done, 32) for done in range(33)]
    assert result.without == pytest.approx(mean_divergence(traces, {}))
    assert result.divergences[0] == pytest.approx(mean_divergence(traces, traces[0]))
    assert result.divergences[0] == pytest.approx(result.without, rel=0.01)
    # A random model looks everywhere at once, which hardly repeats from passage to passage.
    assert len(result.divergences) == 5 and min(result.divergences) < 0.98 * result.without
    assert min(result.divergences) == pytest.approx(mean_divergence(traces, result.layers))
    for name, numbers in sample_weights(model).items():
        torch.testing.assert_close(numbers, before[name], rtol=0, atol=0)
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())
    for index, kernels in result.layers.items():
        for name, tensor in kernels.tensors().items():
            assert not torch.equal(tensor, traces[0][index].tensors()[name]), (index, name)


def test_the_first_kernels_stay_where_none_are_better(traces, tmp_path):
    result, _ = learnt(traces, tmp_path / "state.pt", epochs=1, rate=30.0)
    assert result.divergences[1] > result.divergences[0]
    assert mean_divergence(traces, result.layers) == pytest.approx(result.divergences[0])


def test_a_run_that_was_broken_off_goes_on_and_gives_the_same(traces, tmp_path, monkeypatch):
    whole, _ = learnt(traces, tmp_path / "whole.pt")
    monkeypatch.setattr(module, "_SAVE_EVERY", 3)
    real, calls = module.predict, []

    def stops(*arguments):
        calls.append(1)
        # The first checks ask 4 times, an epoch 8 times and its check twice; then the second step is begun.
        if len(calls) == 4 + 10 + 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(module, "predict", stops)
    with pytest.raises(KeyboardInterrupt):
        learnt(traces, tmp_path / "broken.pt")
    assert all(weight.requires_grad for weight in shared("llama").parameters())
    again, told = learnt(traces, tmp_path / "broken.pt")
    assert told == [(done, 8) for done in range(4, 9)]
    assert again.divergences == whole.divergences
    for index, kernels in again.layers.items():
        for name, tensor in kernels.tensors().items():
            torch.testing.assert_close(tensor, whole.layers[index].tensors()[name], rtol=0, atol=0)


# The command.


@pytest.fixture
def train_less(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HEADWISE_MODEL", str(chatty.save(tmp_path / "tiny", 256)))
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"{chatty.TEXT} {number}" for number in range(60)), encoding="utf-8")

    def call(out, *more):
        small = ["--sequences=10", "--shortest=64", "--longest=80", "--rows=20", "--width=8", "--features=4"]
        with pytest.raises(SystemExit) as ended:
            main(
                ["train-less", "--out", str(out), "--text", str(text), *small, "--policy=streamingllm:window=9", *more]
            )
        read = capsys.readouterr()
        return ended.value.code, read.out, read.err

    return call


def test_the_command_trains_alone_and_then_together(train_less, tmp_path):
    both, then = (tmp_path / name for name in ("both", "then"))
    code, out, err = train_less(both, "--epochs=1", "--together=2")
    assert code == 0, err
    assert "each layer alone" in out and "epoch 2 together" in out
    code, out, err = train_less(then, "--epochs=0", "--start", str(both), "--together=1", "--together-rate=0")
    assert code == 0, err
    # Weights are halved in precision between two commands.
    before, after = load_kernels(both), load_kernels(then)
    for index, kernels in after.layers.items():
        for name, tensor in kernels.tensors().items():
            torch.testing.assert_close(tensor, before.layers[index].tensors()[name], atol=1e-3, rtol=1e-3)
    assert after.about["together"]["epochs"] == 1 and after.about["start"]["digest"] == before.digest
    assert after.about["layers"] == before.about["layers"]
    found = [kernels.about["divergence"]["with"] for kernels in (before, after)]
    assert [len(each) for each in found] == [3, 2]
    assert found[1] == pytest.approx([min(found[0])] * 2, rel=0.01)
    assert not (then / "work").exists()
    # A trace takes more than 20 kB here; what the first part captures is not counted where that is left out.
    more = ("--epochs=0", "--start", str(both), "--together=1")
    code, _, err = train_less(tmp_path / "out", *more, "--store-limit=100kB")
    assert code == 2 and "or fewer" in err


def test_the_command_wants_kernels_to_start_from(train_less, tmp_path):
    code, _, err = train_less(tmp_path / "out", "--epochs=0", "--together=1")
    assert code == 2 and "start from" in err and err.count("\n") == 1


def test_an_interrupted_command_takes_no_trace_twice(train_less, tmp_path, monkeypatch):
    import headwise.training.less.run as run

    def stop(*_):
        raise KeyboardInterrupt

    real = run.train_jointly
    monkeypatch.setattr(run, "train_jointly", stop)
    code, _, err = train_less(tmp_path / "out", "--epochs=1", "--together=1")
    assert code == 130 and "--resume" in err
    monkeypatch.setattr(run, "train_jointly", real)
    monkeypatch.setattr(run, "record_trace", stop)
    code, _, err = train_less(tmp_path / "out", "--epochs=1", "--together=1", "--resume")
    assert code == 0, err
