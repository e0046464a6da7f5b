"""Training of gates: what is captured, what is learnt from it, and the command."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import chatty
import headwise
import tiny
from headwise.cli.main import main
from headwise.gate.inputs import PLACE
from headwise.training.gate.capture import ScoredPrompt, record_scores
from headwise.training.gate.one_layer import (
    TrainableGate,
    TrainingOptions,
    correlation,
    log_score,
    rank_correlation,
    train,
)


@pytest.mark.shapes
def test_what_is_captured_is_what_kvzip_chooses_by():
    model, ids = tiny.llama(layers=3), tiny.prompt(47, seed=5)
    found = record_scores(model, tiny.tokenizer(), ids)
    assert sorted(found) == [0, 1, 2]
    cache = headwise.HeadwiseCache(model, headwise.KVzip(9, sinks=0), tokenizer=tiny.tokenizer())
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
    scores = torch.stack([layer.score for layer in found.values()])
    worst = scores.flatten().sort(descending=True).values[9 * 6 - 1]
    kept = [layer.core.kept_tokens[0].tolist() for layer in cache.headwise_layers]
    assert (scores >= worst).sum(dim=1).tolist() == kept


@pytest.mark.shapes
def test_inputs_that_are_captured_are_keys_before_their_rotation():
    model, ids = tiny.llama(layers=3), tiny.prompt(47, seed=5)
    asked = []
    # With its first cache a model is tried, which is no prompt.
    headwise.HeadwiseCache(model, headwise.Full())
    handle = model.model.layers[1].self_attn.k_proj.register_forward_hook(lambda *seen: asked.append(seen[-1]))
    found = record_scores(model, tiny.tokenizer(), ids)
    handle.remove()
    torch.testing.assert_close(found[1].inputs[:, :-PLACE], asked[0][0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[1].inputs[:, -2], torch.arange(47) / 47)


def test_rank_correlation():
    one = torch.tensor([[1.0, 5.0, 2.0], [2.0, 6.0, 2.0], [3.0, 7.0, 2.0], [4.0, 8.0, 2.0]])
    other = torch.tensor([[10.0, -1.0, 1.0], [99.0, -2.0, 2.0], [20.0, -3.0, 3.0], [1e4, -4.0, 4.0]])
    # Ranks 1 3 2 4: 1 - 6 * 2 / (4 * 15).
    assert rank_correlation(one, other).tolist() == pytest.approx([0.8, -1.0, 0.0])
    tied = torch.tensor([[1.0], [1.0], [2.0], [3.0]])
    # Ranks 1.5 1.5 3 4 against 1 2 3 4: covariance 4.5, variances 4.5 and 5.
    assert rank_correlation(tied, one[:, :1]).tolist() == pytest.approx([4.5 / (4.5 * 5) ** 0.5])


def test_scores_of_nothing_have_a_logarithm():
    found = log_score(torch.tensor([[0.0, 0.5]]))
    assert found.isfinite().all()
    assert float(found[0, 1]) == pytest.approx(-0.6931, abs=1e-4)


def test_folded_weights_are_the_network_that_was_trained():
    inputs, target = torch.randn(50, 7) * 3 + 1, torch.randn(50, 2) * 2 - 4
    inputs[:, 3] = 2.0
    network = TrainableGate(inputs, target, 5)
    folded = network.folded().predict(inputs)
    torch.testing.assert_close(folded, network(inputs).detach() * target.std(dim=0) + target.mean(dim=0))
    assert folded.isfinite().all()


def prompts(count, seed):
    """Scores that depend on the inputs by a fixed function that is not linear."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        inputs = torch.randn(200, 6, generator=draw)
        logarithm = torch.stack([inputs[:, 0] * inputs[:, 1], inputs[:, 2].abs() - inputs[:, 3]], dim=1)
        made.append(ScoredPrompt(inputs, (logarithm - 4).exp()))
    return made


@pytest.mark.shapes
def test_what_can_be_learnt_is():
    result = train(prompts(20, 0), prompts(3, 1), TrainingOptions(width=32, epochs=15, batch=64))
    assert len(result.correlations) == 15
    assert result.correlation == max(result.correlations) > 0.95
    assert correlation(result.gate, prompts(3, 1)) == pytest.approx(result.correlation)


def test_the_best_epoch_counts(monkeypatch):
    import headwise.training.gate.one_layer as module

    seen, found = [], iter([0.1, 0.9, 0.3])
    monkeypatch.setattr(module, "correlation", lambda gate, _: (seen.append(gate), next(found))[1])
    result = train(prompts(1, 0), prompts(1, 1), TrainingOptions(width=4, epochs=3))
    assert (result.correlations, result.correlation) == ([0.1, 0.9, 0.3], 0.9)
    assert result.gate is seen[1]


def test_scores_that_are_all_the_same_are_learnt_too():
    same = [ScoredPrompt(torch.randn(40, 6), torch.zeros(40, 2))]
    result = train(same, same, TrainingOptions(width=4, epochs=1))
    assert result.correlation == 0
    assert result.gate.predict(same[0].inputs).isfinite().all()


# The command.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return chatty.save(tmp_path_factory.mktemp("tiny"), 512)


@pytest.fixture
def train_gate(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HEADWISE_MODEL", str(folder))
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"{chatty.TEXT} {number}" for number in range(60)), encoding="utf-8")

    def call(*more):
        small = ["--sequences=10", "--shortest=64", "--longest=100", "--epochs=2", "--width=8"]
        with pytest.raises(SystemExit) as ended:
            main(["train-gate", "--out", str(tmp_path / "out"), "--text", str(text), *small, *more])
        read = capsys.readouterr()
        return ended.value.code, read.out, read.err

    return call


def test_the_command_makes_a_folder_that_a_cache_takes(train_gate, folder, tmp_path):
    code, out, err = train_gate()
    assert code == 0, err
    assert "rank correlation" in out
    about = json.loads((tmp_path / "out" / "config.json").read_text())
    assert about["training"]["width"] == 8 and about["texts"][0]["sha256"]
    assert sorted(about["layers"]) == [str(layer) for layer in range(chatty.LAYERS)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "gates.safetensors"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    cache = headwise.HeadwiseCache(model, headwise.KVzip(7, gate=str(tmp_path / "out")))
    with torch.no_grad():
        model(input_ids=torch.arange(8, 50)[None], past_key_values=cache)
    assert torch.cat([layer.core.kept_tokens for layer in cache.headwise_layers]).double().mean() == 7


def test_an_interrupted_command_goes_on_and_gives_the_same(train_gate, tmp_path, monkeypatch):
    assert train_gate()[0] == 0
    expected = (tmp_path / "out" / "gates.safetensors").read_bytes()
    (tmp_path / "out" / "gates.safetensors").unlink()
    import headwise.training.gate.run as module

    real = {"record_scores": module.record_scores, "train": module.train}

    def stop(name, after):
        """Let it be called so often; returns the calls."""
        calls = []

        def counted(*arguments):
            if len(calls) == after:
                raise KeyboardInterrupt
            calls.append(1)
            return real[name](*arguments)

        monkeypatch.setattr(module, name, counted)
        return calls

    stop("record_scores", 3)
    code, _, err = train_gate()
    assert code == 130 and "--resume" in err
    captured, _ = stop("record_scores", 99), stop("train", 1)
    assert train_gate("--resume")[0] == 130
    assert len(captured) == 7
    code, _, err = train_gate()
    assert code == 2 and "unfinished run" in err
    code, _, err = train_gate("--resume", "--seed", "5")
    assert code == 2 and "other options" in err
    trained = stop("train", 99)
    code, _, err = train_gate("--resume")
    assert code == 0, err
    assert (len(captured), len(trained)) == (7, chatty.LAYERS - 1)
    assert (tmp_path / "out" / "gates.safetensors").read_bytes() == expected


def test_bad_requests_are_refused_in_one_line(train_gate, tmp_path):
    code, _, err = train_gate("--shortest", "101")
    assert code == 2 and "longer than the longest" in err and err.count("\n") == 1
    code, _, err = train_gate("--text", str(tmp_path / "missing.txt"))
    assert code == 2 and "no file" in err
