"""Evaluation of steering: what a model is given in every way, what is measured of it, and the command."""

from __future__ import annotations

import json

import pytest
import torch

import chatty
import commands
import headwise
from headwise.eval.steering.choice import Choice
from headwise.eval.steering.marked_recall import MarkedRecall
from headwise.eval.steering.treatments import Treatment, make_treatments
from headwise.eval.task import Subject
from headwise.measure.contrasts import made_contrasts
from headwise.policies import Full, SnapKV
from headwise.steer.steering import Steering

HEADS = ((0, (1, 2)), (1, (0,)))


@pytest.fixture(scope="module")
def subject():
    return Subject(chatty.model(1024), chatty.tokenizer(chat=False), {})


def answers_of(subject, text, spans, steering, wanted, unwanted):
    """Margin by a pass of its own."""
    inputs, marked = headwise.encode_marked(subject.tokenizer, text, spans)
    cache = headwise.HeadwiseCache(subject.model, Full(), steering=steering)
    if steering is not None:
        cache.mark(marked)
    one, other = (subject.tokenizer(each)["input_ids"] for each in (wanted, unwanted))
    common = next(i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
    with torch.no_grad():
        ids = torch.cat([inputs["input_ids"], torch.tensor([one[:common]], dtype=torch.long)], dim=1)
        logits = subject.model(input_ids=ids, past_key_values=cache).logits[0, -1]
    return float(logits[one[common]] - logits[other[common]])


@pytest.mark.parametrize("way", ["nothing", "asterisks", "quotes", "examples", "heads", "every head"])
def test_what_a_model_is_given(subject, way):
    task = Choice("language", 3, seed=4)
    item = task.items(subject.tokenizer)[1]
    kind = Treatment(Full(), way, HEADS if way == "heads" else (), 0.1)
    found = task.measure(subject, item, kind, None)
    span, steering = item.data["spans"][0], None
    if way in ("heads", "every head"):
        steering = Steering(dict(HEADS) if way == "heads" else None, 0.1)
    margins = []
    for text in (item.data["text"], *item.data["paraphrases"]):
        if way in ("asterisks", "quotes"):
            sign = "*" if way == "asterisks" else '"'
            text = text.replace(span, f"{sign}{span}{sign}")
        if way == "examples":
            text = "\n".join([*(f"{asked}{answer}." for asked, answer in item.data["examples"]), text])
        margins.append(answers_of(subject, text, [span], steering, item.data["wanted"], item.data["unwanted"]))
    assert found.details["margins"] == pytest.approx(margins, abs=1e-4)
    assert found.metrics == {
        "efficacy": float(margins[0] > 0),
        "margin": pytest.approx(margins[0], abs=1e-4),
        "paraphrase": sum(margin > 0 for margin in margins[1:]) / 2,
    }


def test_what_is_measured_is_not_what_heads_were_profiled_by():
    items = Choice("city", 50).items(None)
    texts = {item.data["text"] for item in items}
    assert len(texts) == 50 and len(texts & {each.text for each in made_contrasts("city", 50, 0)}) < 5
    assert not any(text in example for item in items[:1] for example, _ in item.data["examples"] for text in texts)


def test_random_heads_are_as_many_as_the_others_and_each_draw_is_another(subject):
    draws = [Treatment(Full(), "random heads", HEADS, 0.1, seed).steering(subject.model).heads for seed in range(6)]
    assert all(sum(map(len, own.values())) == 3 for own in draws)
    assert len({str(own) for own in draws}) > 3
    assert draws[0] == Treatment(Full(), "random heads", HEADS, 0.1, 0).steering(subject.model).heads


def test_all_heads_of_a_layer(subject):
    """As files have them that list layers alone."""
    (named, drawn) = make_treatments({"full": Full()}, {"a": {1: None}}, 0.01, ("heads", "random heads"), 1)
    assert named.treatment.steering(subject.model).heads == {1: None}
    assert sum(map(len, drawn.treatment.steering(subject.model).heads.values())) == 4


def test_rows_of_a_table():
    policies = {"full": Full(), "snapkv:keep=0.5": SnapKV(0.5)}
    ways = ("nothing", "heads", "random heads")
    rows = make_treatments(policies, {"a": {0: (1,)}, "b": {1: (0, 2)}}, 0.01, ways, 2)
    names = ["nothing", "heads of a", "heads of b", "random heads 1", "random heads 2"]
    assert [row.label for row in rows] == [*names, *(f"{name}, snapkv:keep=0.5" for name in names)]
    assert rows[2].treatment.heads == ((1, (0, 2)),) and rows[8].treatment.heads == ((0, (1,)),)


@pytest.mark.usefixtures("short_manual")
@pytest.mark.parametrize("query", ["agnostic", "aware"])
def test_a_fact_that_is_marked_is_asked_for(query, subject, monkeypatch):
    """The same question, read in the same parts; with the fact in asterisks, or the cache told where it is."""
    task = MarkedRecall(query, context=200, count=2, new_tokens=4, facts=2)
    item, told = task.items(subject.tokenizer)[1], []
    assert item.data["fact"] in item.data["document"] and item.data["expected"][0] in item.data["fact"]
    mark, seen = headwise.HeadwiseCache.mark, []
    monkeypatch.setattr(
        headwise.HeadwiseCache, "mark", lambda cache, marked: (told.append(marked), mark(cache, marked))
    )
    embed = subject.model.get_input_embeddings().register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    for way in ("nothing", "asterisks", "every head"):
        seen.clear()
        task.measure(subject, item, Treatment(Full(), way, (), 0.1), None)
        prompt = torch.cat([ids for ids in seen if ids.shape[1] > 1], dim=1)[0]
        text = subject.tokenizer.decode(prompt)
        fact = f"*{item.data['fact']}*" if way == "asterisks" else item.data["fact"]
        assert f"{fact}" in text and text.endswith(item.data["cue"])
        assert ("*" in text) == (way == "asterisks")
        assert len([ids for ids in seen if ids.shape[1] > 1]) == (1 if query == "aware" else 2)
    embed.remove()
    ((((start, stop),),),) = [marked.spans for marked in told]
    assert told[0].columns == len(prompt)
    assert item.data["fact"] in subject.tokenizer.decode(prompt[start:stop])
    with pytest.raises(headwise.ConfigurationError, match="has no examples"):
        task.measure(subject, item, Treatment(Full(), "examples", (), 0.1), None)


def test_the_command(tmp_path):
    folder, heads = chatty.save(tmp_path / "model", 1024), tmp_path / "some.json"
    heads.write_text('{"1": [0, 3]}')
    command = ("eval", "steering", "--model", folder, "--task", "occupation", "--items", 2, "--out", tmp_path / "run")
    options = ("--heads", heads, "--draws", 1, "--policy", "full", "--policy", "snapkv:keep=0.5,window=4")
    answer = commands.call(*command, *options, "--json")
    assert answer.code == 0, answer.err
    (summary,) = answer.json["summaries"]
    names = ["nothing", "asterisks", "quotes", "examples", "heads of some", "every head", "random heads 1"]
    labels = [row["policy"] for row in summary["rows"]]
    assert labels == [*names, *(f"{name}, snapkv:keep=0.5,window=4" for name in names)]
    assert summary["title"] == "choice: occupation" and summary["primary"] == "efficacy"
    assert all(row["kept_ratio"] < 0.9 for row in summary["rows"][7:])
    assert len(json.loads((tmp_path / "run" / "results.json").read_text())["units"]) == 28
    commands.assert_one_line(commands.call(*command, "--ways", "shouting"), "there is no way 'shouting'")
    commands.assert_one_line(commands.call(*command, "--ways", "heads"), "--heads says which heads are steered")
    recall = commands.call(*command[:-1], tmp_path / "other", "--task", "recall", "--ways", "examples")
    commands.assert_one_line(recall, "recall has no examples")
