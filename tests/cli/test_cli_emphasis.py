"""`headwise generate --emphasize`: what is marked, which heads obey, and what is said of it."""

from __future__ import annotations

import json

import pytest
from asking import QUESTION, short

import chatty
import headwise as library
from commands import assert_one_line


@pytest.fixture
def heads(tmp_path):
    path = tmp_path / "heads.json"
    path.write_text('{"1": [0, 3]}')
    return path


def test_the_text_is_that_of_a_steered_cache(headwise, folder, heads):
    answer = headwise(*short("--json", "--policy", "full", "--emphasize", "the log", "--heads", heads, "--alpha", 0.1))
    assert answer.code == 0, answer.err
    model, tokenizer = library.load_model(str(folder))
    chat = [{"role": "user", "content": QUESTION}]
    inputs, marked = library.encode_marked(tokenizer, chat, ["the log"])
    cache = library.HeadwiseCache(model, library.Full(), steering=library.Steering({1: [0, 3]}, 0.1))
    cache.mark(marked)
    ids = model.generate(**inputs, past_key_values=cache, max_new_tokens=12, do_sample=False)
    text = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer.json["text"].strip() == text.strip()
    found = answer.json["steering"]
    row = 2 * 8 * 4 + 4
    (((start, stop),),) = found["spans"]
    assert found["how"] == "Steering(alpha=0.1)" and found["heads"] == {"1": [0, 3]}
    assert found["pinned_bytes"] == (stop - start) * row * chatty.LAYERS * chatty.KV_HEADS
    plain = headwise(*short("--json", "--policy", "full"))
    assert plain.json["text"] != answer.json["text"] and "steering" not in plain.json


def test_what_a_template_writes_before_the_prompt_is_not_meant(headwise, heads):
    """The template's own text says user before the prompt does."""
    prompt = ("--prompt", "  who is the user?", "--emphasize", "user", "--heads", heads, "--policy", "full")
    answer = headwise("generate", *prompt, "--max-new-tokens", 2, "--json")
    assert answer.code == 0, answer.err
    tokenizer = chatty.tokenizer()
    chat = [{"role": "user", "content": "  who is the user?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    (((start, stop),),) = answer.json["steering"]["spans"]
    assert tokenizer.decode(ids[start:stop]).strip() == "user"
    assert tokenizer.decode(ids[stop:]).startswith("?")


def test_people_are_told(headwise, heads):
    answer = headwise(*short("--emphasize", "the log", "--emphasize", "sat", "--heads", heads))
    assert answer.code == 0, answer.err
    assert "steered" in answer.err and "2 heads of 1 layers to" in answer.err


def test_all_heads_of_a_model_that_none_are_known_of(headwise):
    answer = headwise(*short("--json", "--emphasize", "the log"))
    assert answer.code == 0
    assert "no heads are known for this model, so all are steered" in answer.err
    assert answer.json["steering"]["heads"] == {"0": [0, 1, 2, 3], "1": [0, 1, 2, 3]}


def test_those_that_come_with_headwise_for_its_default_model(headwise, heads, folder, monkeypatch):
    monkeypatch.setattr("headwise.steer.heads.shipped_heads", lambda: heads)
    scores = {"model_name": folder.name, "shape": [2, 4]}
    heads.with_name("heads.scores.json").write_text(json.dumps(scores))
    answer = headwise(*short("--json", "--emphasize", "the log"))
    assert (answer.code, answer.err) == (0, "")
    assert answer.json["steering"]["heads"] == {"1": [0, 3]}


def test_heads_that_come_with_headwise_are_of_its_default_model():
    shipped = library.Steering(emphasis_heads())
    assert shipped.heads and max(shipped.heads) < 30
    assert all(head < 9 for own in shipped.heads.values() for head in own)


def emphasis_heads():
    from headwise.steer.heads import made_for, shipped_heads

    assert made_for(shipped_heads()) == ("smollm2-135m-instruct", (30, 9))
    return shipped_heads()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--alpha", 0.1), "give --emphasize TEXT"),
        (("--emphasize", "the log", "--alpha", 0), "alpha must be above 0 and at most 1"),
        (("--emphasize", "the fog"), "'the fog' is not in the text; nearest is 'the log'"),
        (("--emphasize", ""), "an empty text cannot be marked"),
        (("--emphasize", "the log", "--heads", "nowhere.json"), "is no file of heads"),
    ],
)
def test_what_is_refused(headwise, options, said):
    answer = headwise(*short(*options))
    assert_one_line(answer, said)
