"""Profiling of heads: margins with one head steered, against whole passes; runs that go on; which heads are chosen."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch

import chatty
import commands
import headwise
import models
from headwise.hosts.transformers.probe import Probe
from headwise.measure.contrasts import FACTS, Contrast, first_answers, made_contrasts, read_contrasts
from headwise.measure.samples import contrasts_of
from headwise.steer.heads import made_for, read_heads, scores_file
from headwise.steer.steering import Steering
from headwise.training.heads import run as heads_run
from headwise.training.heads.margins import batches, measure_heads, measure_layers
from headwise.training.heads.run import HeadRun, Recipe, steerable_heads
from headwise.training.heads.select import among_the_best, at_most, by_layer, ranked
from steering_oracle import steered

# Unequal lengths; of the third the span stands twice, and its last place counts; answers begin alike.
SAMPLES = [
    Contrast("The cat sat on the mat. Who sat there? The", ("cat sat",), " dog", " log"),
    Contrast("Nobody knows. Ask the dog on the log! It", ("the dog",), " sat", " mat"),
    Contrast("Ask the cat, ask the cat, ask", ("ask the cat", "Ask"), " the log", " the mat"),
]


def margin_of(model, tokenizer, sample, steering):
    """By a whole pass over one prompt."""
    spans = [(sample.text.rindex(span), sample.text.rindex(span) + len(span)) for span in sample.spans]
    inputs, marked = headwise.encode_marked(tokenizer, sample.text, spans)
    answers = [tokenizer(each, add_special_tokens=False)["input_ids"] for each in (sample.wanted, sample.unwanted)]
    common, one, other = first_answers(*answers)
    ids = torch.cat([inputs["input_ids"], torch.tensor([common], dtype=torch.long)], dim=1)
    cache = headwise.HeadwiseCache(model, headwise.Full(), steering=steering)
    if steering is not None:
        cache.mark(headwise.Marked(marked.spans, ids.shape[1]))
    with torch.no_grad():
        logits = model(input_ids=ids, past_key_values=cache).logits[0, -1]
    return float(logits[one] - logits[other])


@pytest.mark.shapes
def test_every_head_is_steered_alone_as_a_whole_pass_would():
    model, tokenizer = chatty.model(), chatty.tokenizer(chat=False)
    (batch,) = batches(tokenizer, SAMPLES, Steering(None, 0.05), 4, torch.device("cpu"))
    assert batch.mask.sum(dim=1).unique().numel() == 3
    found = measure_heads(model, batch, [0, 1], 4)
    whole = measure_layers(model, batch, [0, 1], 4)
    assert found.count == 3
    plain = sum(margin_of(model, tokenizer, sample, None) for sample in SAMPLES)
    assert found.plain == pytest.approx(plain, abs=1e-4)
    for layer in (0, 1):
        for head in range(4):
            steering = Steering({layer: [head]}, 0.05)
            expected = sum(margin_of(model, tokenizer, sample, steering) for sample in SAMPLES)
            assert found.heads[layer][head] == pytest.approx(expected, abs=1e-4)
        expected = sum(margin_of(model, tokenizer, sample, Steering([layer], 0.05)) for sample in SAMPLES)
        assert whole.heads[layer] == [pytest.approx(expected, abs=1e-4)]
    assert len({round(margin, 4) for own in found.heads.values() for margin in own}) == 8


@pytest.mark.parametrize("family", ["gemma3", "gpt-oss", "gpt2", "gpt-neox", "qwen3"])
@pytest.mark.parametrize("before", [0, 7])
def test_layers_of_every_kind_give_what_they_gave_below(family, before):
    """Sliding layers, sink logits, and layers of other names; from the first mark on, and from the beginning."""
    model = models.shared(family)
    ids, mask = models.padded_pair()
    marks = torch.zeros(ids.shape)
    marks[:, 20:30] = -3.0
    marks[:, before + 12 : before + 15] = -1.0
    probe, heads = Probe(model, ids, mask, before), model.config.num_attention_heads
    layer = list(models.full_layers(family))[-1]
    plain, gates = probe.read(), torch.zeros(2, heads)
    gates[0, 1] = gates[1, 3] = 1.0
    found = probe.answers(layer, gates, marks)
    # Nothing stays of it.
    torch.testing.assert_close(probe.answers(layer, gates * 0, marks), plain, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(probe.answers(layer, gates, marks), found, atol=1e-4, rtol=1e-4)
    whole = Probe(model, ids, mask)
    torch.testing.assert_close(whole.answers(layer, gates, marks), found, atol=1e-4, rtol=1e-4)
    for row, head in ((0, 1), (1, 3)):
        with steered(model, {layer: [head]}, marks[row : row + 1]), torch.no_grad():
            own = {"input_ids": ids[row : row + 1], "attention_mask": mask[row : row + 1]}
            positions = (own["attention_mask"].cumsum(1) - 1).clamp(min=0)
            expected = model(**own, position_ids=positions, use_cache=False).logits[0, -1]
        torch.testing.assert_close(found[row], expected, atol=2e-4, rtol=2e-4)
    assert not torch.allclose(found, plain, atol=1e-3)


def test_batches_hold_so_many_tokens(monkeypatch):
    monkeypatch.setattr("headwise.training.heads.margins._TOKENS", 4 * 60)
    parts = list(batches(chatty.tokenizer(chat=False), SAMPLES * 3, Steering(None), 4, torch.device("cpu")))
    assert len(parts) > 2 and sum(len(part.ids) for part in parts) == 9
    assert all(4 * part.ids.numel() <= 240 or len(part.ids) == 1 for part in parts)


def file_of(tmp_path, samples=SAMPLES, name="task.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(each.to_dict()) + "\n" for each in samples), encoding="utf-8")
    return path


def run_of(tmp_path, **options):
    recipe = {"tasks": (str(tmp_path / "task.jsonl"),), "samples": 3, "alpha": 0.05}
    resume = options.pop("resume", False)
    given = Recipe(**recipe | options)
    return HeadRun(chatty.model(), chatty.tokenizer(chat=False), given, tmp_path / "work.json", resume=resume)


def test_a_run_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    monkeypatch.setattr("headwise.training.heads.margins._TOKENS", 1)
    file_of(tmp_path)
    told, calls, measure = [], [], heads_run.measure_heads
    whole = run_of(tmp_path).run(lambda *each: told.append(each))
    assert [each[1:] for each in told] == [(1, 3), (2, 3), (3, 3)]
    (tmp_path / "work.json").unlink()

    def interrupted(*given):
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*given)

    monkeypatch.setattr(heads_run, "measure_heads", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_of(tmp_path).run()
    with pytest.raises(headwise.ConfigurationError, match="go on with --resume"):
        run_of(tmp_path)
    with pytest.raises(headwise.MismatchError, match="was begun with another alpha"):
        run_of(tmp_path, alpha=0.1, resume=True)
    again = run_of(tmp_path, resume=True)
    assert again.run() == whole
    for damaged in ("{", "[]", "{}"):
        (tmp_path / "work.json").write_text(damaged)
        with pytest.raises(headwise.InputError, match="holds no scores of heads to go on with"):
            run_of(tmp_path, resume=True)
    assert len(calls) == 4
    assert again.plain == {str(tmp_path / "task.jsonl"): pytest.approx(again.plain[str(tmp_path / "task.jsonl")])}


def test_coarse_to_fine_looks_at_the_heads_of_the_best_layers(tmp_path):
    file_of(tmp_path)
    fine = run_of(tmp_path)
    (scores,) = fine.run().values()
    whole = measure_layers(chatty.model(), fine.parts[str(tmp_path / "task.jsonl")][0], [0, 1], 4)
    best = max((0, 1), key=lambda layer: whole.heads[layer][0])
    (tmp_path / "work.json").unlink()
    (coarse,) = run_of(tmp_path, coarse=1).run().values()
    assert coarse == {best: scores[best]}


def test_what_cannot_be_profiled_is_refused(tmp_path):
    file_of(tmp_path)
    with pytest.raises(headwise.ConfigurationError, match="by tasks, each of which is given once"):
        run_of(tmp_path, tasks=())
    with pytest.raises(headwise.ConfigurationError, match="the best 1 to 2 layers"):
        run_of(tmp_path, coarse=3)
    with pytest.raises(headwise.UnsupportedModelError, match="no heads that can be steered"):
        steerable_heads(models.shared(models.ALL_SLIDING))


SCORES = [{0: [1.0, 5.0, 3.0], 2: [4.0, 4.0, 0.0]}, {0: [9.0, 1.0, 8.0], 2: [7.0, 0.0, 2.0]}]


def test_heads_that_are_among_the_best_for_every_task():
    assert ranked(SCORES[0]) == [(0, 1), (2, 0), (2, 1), (0, 2), (0, 0), (2, 2)]
    assert ranked(SCORES[1]) == [(0, 0), (0, 2), (2, 0), (2, 2), (0, 1), (2, 1)]
    assert among_the_best(SCORES, 3) == [(2, 0)]
    assert among_the_best(SCORES, 4) == [(0, 2), (2, 0)]
    with pytest.raises(headwise.ConfigurationError, match="no head is among the best 2"):
        among_the_best(SCORES, 2)
    assert at_most(SCORES, 1) == ([(2, 0)], 3)
    assert at_most(SCORES, 3) == ([(0, 2), (2, 0)], 4)
    assert at_most(SCORES, 9) == (sorted(ranked(SCORES[0])), 6)
    assert at_most(SCORES[:1], 2) == ([(0, 1), (2, 0)], 2)
    assert by_layer([(0, 2), (2, 0), (2, 1)]) == {0: [2], 2: [0, 1]}


@pytest.mark.parametrize("kind", FACTS)
def test_contrasts_that_are_made(kind):
    found = made_contrasts(kind, 60, 1)
    assert found == made_contrasts(kind, 60, 1)
    assert len({each.text for each in found}) == 60
    assert len(set(found) & set(made_contrasts(kind, 60, 2))) < 6
    for each in found:
        assert each.text.count(each.spans[0]) == 1 and each.wanted in each.spans[0]
        assert each.unwanted not in each.spans[0] and each.unwanted in each.text
        assert len({each.text, *each.paraphrases}) == 3
        # What is asked does not tell the answer.
        assert each.text.count(each.wanted.strip()) == 1
    assert max(Counter(each.wanted for each in found).values()) < 15


def test_contrasts_of_files(tmp_path):
    path = file_of(tmp_path)
    assert read_contrasts(path) == SAMPLES
    assert set(contrasts_of(str(path), 99, 0)) == set(SAMPLES)
    assert len(contrasts_of(str(path), 2, 0)) == 2
    for line, said in (
        ("{", "line 1 of"),
        ('{"text": "a", "wanted": "b", "unwanted": "c"}', "spans, a list of texts"),
        ('{"text": "a", "wanted": "b", "spans": ["a"]}', "has text, wanted and unwanted"),
        ("[]", "a sample is a JSON object"),
        ("", "holds no samples"),
    ):
        path.write_text(line)
        with pytest.raises(headwise.InputError, match=said):
            read_contrasts(path)
    with pytest.raises(headwise.ConfigurationError, match="'nothing' is neither a file nor one of occupation"):
        contrasts_of("nothing", 1, 0)
    with pytest.raises(headwise.ConfigurationError, match="at most"):
        made_contrasts("city", 10**6, 0)


def test_answers_that_begin_alike():
    assert first_answers([5, 6, 7], [5, 6, 8, 9]) == ([5, 6], 7, 8)
    for same in ([5], [5, 6]):
        with pytest.raises(headwise.InputError, match="do not differ"):
            first_answers([5], same)


def test_the_command_writes_heads_and_scores(tmp_path):
    folder, task = chatty.save(tmp_path / "model"), file_of(tmp_path)
    out = tmp_path / "heads.json"
    options = ("profile-heads", "--task", task, "--samples", 3, "--model", folder, "--out", out)
    answer = commands.call(*options, "--heads", 3, "--layers", 2)
    assert answer.code == 0, answer.err
    heads = read_heads(out)
    assert 1 <= sum(len(own) for own in heads.values()) <= 3
    assert "none steered" in answer.out and "about 1 min" in answer.err
    assert made_for(out) == ("model", (2, 4))
    steering = headwise.Steering(out)
    headwise.HeadwiseCache(chatty.model(), headwise.Full(), steering=steering)
    with pytest.raises(headwise.MismatchError, match="found in model, which has 2 layers of 4 heads"):
        headwise.HeadwiseCache(models.shared("llama"), headwise.Full(), steering=steering)
    again = commands.call(*options, "--heads", 3, "--layers", 2)
    assert again.code == 2 and "--resume" in again.err
    resumed = commands.call(*options, "--keep", 2, "--layers", 2, "--resume")
    assert resumed.code == 0 and len(json.loads(scores_file(out).read_text())["done"]) == 1
    commands.assert_one_line(commands.call("profile-heads", "--out", out), "--task says what heads are profiled by")
    scores_file(out).write_text("{}")
    with pytest.raises(headwise.InputError, match="holds no scores of heads"):
        headwise.Steering(out)
