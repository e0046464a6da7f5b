"""Instructions that a program can check: what is asked, which answers count, what a model is given, and the command."""

from __future__ import annotations

import json
import math

import pytest
import torch

import chatty
import commands
import headwise
from headwise.eval.steering.fluency import fluency
from headwise.eval.steering.instructed import Instructed
from headwise.eval.steering.obeyed import obeyed
from headwise.eval.steering.treatments import Treatment
from headwise.eval.task import Subject
from headwise.measure.chat import write_answer, write_prompt
from headwise.measure.contrasts import NAMES, first_answers
from headwise.measure.instructions import INSTRUCTIONS, RULES, Instruction, made_instructions
from headwise.measure.samples import contrasts_of
from headwise.policies import Full
from headwise.steer.steering import Steering
from headwise.training.heads.margins import batches

JSON = Instruction("", "Give JSON", "json", {"name": "Mary", "occupation": "pilot"}, "", "")
CHANGED = "Mary was born in Rome. They worked there as a pilot. They played the harp with their friends."
PRONOUNS = Instruction("", "Write this again", "pronouns", {"changed": CHANGED}, "", "")


def rule(name, detail=""):
    return Instruction("", "Use capital letters only.", name, {"detail": detail, "thing": "horse"}, "", "")


@pytest.mark.parametrize("kind", INSTRUCTIONS)
def test_answers_that_obey_count_and_those_that_ignore_do_not(kind):
    found = made_instructions(kind, 120, 3)
    assert found == made_instructions(kind, 120, 3) and len({each.asked for each in found}) == 120
    assert {each.rule for each in found} == (set(RULES) if kind == "rules" else {kind})
    for each in found:
        assert set(obeyed(each, each.obeying).values()) == {1.0}, each
        assert not any(obeyed(each, each.ignoring).values()), each
        assert not any(obeyed(each, "").values()), each
        # The text itself, or the instruction, is no answer.
        assert not obeyed(each, each.asked)["obeyed"] and not obeyed(each, each.span)["obeyed"], each
        assert each.asked.count(each.span) == 1


@pytest.mark.parametrize("kind", INSTRUCTIONS)
def test_what_is_measured_has_nothing_of_what_heads_are_profiled_by(kind):
    profiled = made_instructions(kind, 200, 0)
    measured = made_instructions(kind, 200, 0, measured=True)
    named = {
        word for each in profiled for word in (*NAMES, each.details.get("thing", "")) if word and word in each.asked
    }
    assert not any(word in each.asked.split() for each in measured for word in named)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('{"name": "Mary", "occupation": "pilot"}', (1, 1, 1)),
        ('\n```json\n{"name": "M", "occupation": "a Pilot", "more": 1}\n```\n', (1, 1, 1)),
        ('JSON: {"name": "Mary", "occupation": "pilot"}', (0, 1, 1)),
        ('{"name": "Mary", "occupation": "judge"}', (1, 1, 0)),
        ('{"name": "the pilot", "occupation": "judge"}', (1, 1, 0)),
        ('{"name": "Mary", "occupation": "copilots"}', (1, 1, 0)),
        ('{"a": {"name": "Mary", "occupation": "pilot"}}', (0, 1, 1)),
        ('{} {"name": "Mary", "occupation": "pilot"', (0, 0, 0)),
        ('{"name": "", "occupation": "pilot"}', (0, 0, 0)),
        ('{"name": "Mary", "occupation": ["pilot"]}', (0, 0, 0)),
        ('{"occupation": "pilot"}', (0, 0, 0)),
        ('"pilot"', (0, 0, 0)),
        ("[1, 2]", (0, 0, 0)),
        ("{}", (0, 0, 0)),
        ("{" * 3000, (0, 0, 0)),
        ('{"a":' * 3000, (0, 0, 0)),
        ("Mary is a pilot.", (0, 0, 0)),
    ],
)
def test_json(answer, expected):
    assert tuple(obeyed(JSON, answer).values()) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (CHANGED, (1, 1)),
        (CHANGED.replace("their", "her"), (1, 0)),
        (CHANGED.replace("They played", "She played"), (0, 0)),
        (CHANGED.replace("They played", "HE played"), (0, 0)),
        ("They.", (0, 0)),
        ("Nothing of this has a pronoun in it.", (0, 0)),
        (CHANGED.replace("They", "Mary"), (0, 0)),
        # Words that hold others.
        (f"{CHANGED} There the shepherd hears this.", (1, 1)),
    ],
)
def test_pronouns(answer, expected):
    assert tuple(obeyed(PRONOUNS, answer).values()) == expected


@pytest.mark.parametrize(
    ("name", "detail", "right", "wrong"),
    [
        ("capitals", "", "A HORSE IS AN ANIMAL, YES.", "A HORSE IS AN Animal, YES."),
        ("capitals", "", "A HORSE IS AN ANIMAL, YES.", "HORSE HORSE"),
        ("capitals", "", "A HORSE IS AN ANIMAL, YES.", "THE CAPITAL OF THE WORLD IS HERE."),
        ("lowercase", "", "a horse is an animal.", "A horse is an animal."),
        ("no commas", "", "A horse is an animal.", "A horse is, yes, an animal."),
        ("list", "", "* A horse is big.\n\n* It can run.", "* A horse is big.\nIt can run."),
        ("list", "", "* A horse is big.\n* It can run.", "* A horse is big.\n* It can\n* run."),
        ("quotes", "", '"A horse is an animal."', '"A horse" is an animal.'),
        ("quotes", "", '"A horse is an animal."', '"A horse" is an "animal".'),
        ("title", "", "<<Horse>> It is an animal.", "<<this>> A horse is an animal."),
        ("title", "", "<<Horse>>\nIt is an animal.", "A horse is an <<animal>>."),
        ("title", "", "<<Horse>>\nIt is an animal.", "<<A horse is an animal>>"),
        ("opening", "To be honest", "To be honest, a horse bites.", "A horse, to be honest, bites."),
        ("ending", "That is all", 'A horse bites. "That is all!"', "That is all: a horse bites."),
        ("word", "winter", "A horse likes the Winter.", "A horse likes the midwinter."),
        ("no commas", "", "A horse is an animal.", "Use capital letters only. A horse does."),
    ],
)
def test_rules(name, detail, right, wrong):
    assert obeyed(rule(name, detail), right) == {"obeyed": 1.0}
    assert obeyed(rule(name, detail), wrong) == {"obeyed": 0.0}


def test_fluency():
    assert fluency("") == fluency("word") == 0.0
    # Two pairs, no two the same, and one triple.
    assert fluency("a b c") == pytest.approx(1 / 3)
    # Pairs ab ba ab ba ab, triples aba bab aba bab.
    pairs = 0.6 * math.log2(5 / 3) + 0.4 * math.log2(5 / 2)
    assert fluency("a b a b a b") == pytest.approx(pairs / 3 + 2 / 3)
    assert fluency("no, no, no, no, no") < fluency("one, two, three, four, five") / 2


def test_prompts_are_written_as_a_chat_where_there_is_a_template():
    shown, asked = [("one?", "1"), ("two?", "2")], " What of it? Say it.\n"
    plain, chat = (write_prompt(chatty.tokenizer(each), asked, shown) for each in (False, True))
    assert plain.text == f"one?\nAnswer: 1\n\ntwo?\nAnswer: 2\n\n{asked}\nAnswer:" and plain.special
    roles = ("user", "assistant") * 2
    said = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in zip(roles, sum(shown, ()), strict=True))
    assert chat.text == f"{said}<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
    assert not chat.special
    for prompt in (plain, chat):
        ((start, stop),) = prompt.ranges(asked, ["it"])
        assert prompt.text[start:stop] == "it" and prompt.text[stop:].startswith(".\n")
    trimmed = chatty.tokenizer.__wrapped__(True)
    trimmed.chat_template = chatty.TEMPLATE.replace("message['content']", "message['content'].strip()")
    prompt = write_prompt(trimmed, asked)
    assert prompt.text[slice(*prompt.ranges(asked, ["What"])[0])] == "What"


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("kind", INSTRUCTIONS)
def test_heads_are_profiled_by_what_an_answer_begins_with(kind, chat):
    tokenizer = chatty.tokenizer(chat)
    for sample in contrasts_of(kind, 12, 0):
        (batch,) = batches(tokenizer, [sample], Steering(None, 0.1), 1, torch.device("cpu"))
        prompt = write_prompt(tokenizer, sample.text)
        answers = [write_answer(tokenizer, each) for each in (sample.wanted, sample.unwanted)]
        common, one, other = first_answers(*(tokenizer(each)["input_ids"] for each in answers))
        assert batch.ids[0].tolist() == [*tokenizer(prompt.text)["input_ids"], *common]
        assert batch.answers[0].tolist() == [one, other]
        marked = tokenizer.decode(batch.ids[0][batch.marks[0] == 0])
        assert sample.spans[0] in marked and len(marked) < len(sample.spans[0]) + 8


@pytest.mark.parametrize("way", ["nothing", "asterisks", "quotes", "examples", "heads", "every head"])
@pytest.mark.parametrize("chat", [False, True])
def test_what_a_model_is_given_and_writes(way, chat):
    subject = Subject(chatty.model(4096), chatty.tokenizer(chat), {})
    task = Instructed("rules", 2, seed=1, new_tokens=5)
    item = task.items(subject.tokenizer)[1]
    told = Instruction(**item.data["instruction"])
    heads = ((0, (1, 2)), (1, (0,)))
    found = task.measure(subject, item, Treatment(Full(), way, heads if way == "heads" else (), 0.1), None)
    sign = {"asterisks": "*", "quotes": '"'}.get(way, "")
    asked = told.asked.replace(told.span, f"{sign}{told.span}{sign}")
    examples = item.data["examples"] if way == "examples" else []
    others = {each.asked: each for each in made_instructions("rules", 200, 1)}
    assert len(item.data["examples"]) == 3
    assert all((others[each].rule, others[each].obeying) == (told.rule, shown) for each, shown in item.data["examples"])
    prompt = write_prompt(subject.tokenizer, asked, examples)
    steering = {"heads": Steering(dict(heads), 0.1), "every head": Steering(None, 0.1)}.get(way)
    inputs, marked = headwise.encode_marked(
        subject.tokenizer, prompt.text, [headwise.Span(told.span, None)], add_special_tokens=prompt.special
    )
    cache = headwise.HeadwiseCache(subject.model, Full(), steering=steering)
    if steering is not None:
        cache.mark(headwise.Marked((marked.spans[0][-1:],), marked.columns))
    new = subject.model.generate(**inputs, past_key_values=cache, max_new_tokens=5, do_sample=False)
    answer = subject.tokenizer.decode(new[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert found.details["answer"] == answer and found.details["rule"] == told.rule
    assert found.metrics == {
        **obeyed(told, answer),
        "fluency": pytest.approx(fluency(answer)),
        "words": len(answer.split()),
    }


def test_what_is_asked_for_in_vain_is_refused():
    with pytest.raises(headwise.ConfigurationError, match="kind must be one of"):
        Instructed("poems")
    with pytest.raises(headwise.ConfigurationError, match="count"):
        Instructed("json", 0)
    with pytest.raises(headwise.ConfigurationError, match="different samples of 'rules' cannot be made"):
        made_instructions("rules", 100_000, 0)
    subject = Subject(chatty.model(64), chatty.tokenizer(), {})
    task = Instructed("json", 1)
    with pytest.raises(headwise.InputError, match="do not fit into the model's 64 positions"):
        task.measure(subject, task.items(subject.tokenizer)[0], Treatment(Full(), "nothing", (), 0.1), None)


def test_the_command(tmp_path):
    folder, heads = chatty.save(tmp_path / "model", 4096), tmp_path / "some.json"
    heads.write_text('{"1": [0, 3]}')
    command = ("eval", "steering", "--model", folder, "--items", 1, "--out", tmp_path / "run", "--draws", 1)
    answer = commands.call(*command, "--task", "json", "--task", "rules", "--heads", heads, "--json")
    assert answer.code == 0, answer.err
    assert [each["title"] for each in answer.json["summaries"]] == ["instructed: json", "instructed: rules"]
    for summary in answer.json["summaries"]:
        assert len(summary["rows"]) == 7 and summary["primary"] == "obeyed"
        assert {"obeyed", "fluency", "words"} <= set(summary["rows"][0]["metrics"])
    units = json.loads((tmp_path / "run" / "results.json").read_text())["units"]
    assert all("answer" in each["details"] for each in units)
