"""Turns: chats with something told in every turn, against generating at their end."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import pytest
import torch

import chatty
import commands
from headwise import HeadwiseCache, SnapKV
from headwise.errors import ConfigurationError
from headwise.eval.cache_kinds import FULL_CACHE, PolicyCache
from headwise.eval.task import Subject
from headwise.eval.turns import Turns, encode_chat
from headwise.policies import Full

pytestmark = pytest.mark.usefixtures("short_manual")

TURNS = Turns(context=300, turns=3, count=2, new_tokens=5)


@pytest.fixture(scope="module")
def subject():
    return Subject(chatty.model(2048), chatty.tokenizer(), {"evict_every": 2})


def parts_of(subject, item):
    ids, ends = item.data["ids"], [0, *item.data["ends"], len(item.data["ids"])]
    return [subject.tokenizer.decode(ids[start:end]) for start, end in itertools.pairwise(ends)]


def test_every_turn_tells_one_fact_and_the_last_asks_for_one(subject):
    asked = []
    for item in TURNS.items(subject.tokenizer):
        *told, question = parts_of(subject, item)
        assert len(told) == 3
        facts = [re.findall(r"The secret number of the (\w+) is (\d{5})\.", text) for text in told]
        assert all(len(each) == 1 for each in facts)
        place = re.search(r"secret number of the (\w+)\?", question).group(1)
        (turn,) = [at for at, ((name, _),) in enumerate(facts) if name == place]
        assert item.data["details"]["turn"] == turn
        assert item.data["expected"] == [facts[turn][0][1]]
        assert all(text.rstrip().endswith("I see.<|im_end|>") for text in told)
        asked.append(turn)
    assert TURNS.title == "turns: facts of 3"


def test_the_newest_count_is_asked_for(subject):
    for item in replace(TURNS, kind="tally").items(subject.tokenizer):
        *told, question = parts_of(subject, item)
        counts = [re.search(r"The visitors of the (\w+) are now (\d{5}) in all\.", text).groups() for text in told]
        assert len({place for place, _ in counts}) == 1 and len({count for _, count in counts}) == 3
        assert f"visitors of the {counts[0][0]}" in question
        assert item.data["expected"] == [counts[-1][1]]


@pytest.mark.parametrize("policy", [Full(), SnapKV(0.3, window=5)], ids=str)
def test_the_answer_is_what_generate_says_at_the_end_of_the_chat(subject, policy):
    for item in TURNS.items(subject.tokenizer):
        outcome = TURNS.measure(subject, item, PolicyCache(policy), None)
        ids = torch.tensor([item.data["ids"]])
        cache = HeadwiseCache(subject.model, policy, evict_every=2, prompt_tokens=item.data["ends"][0])
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 5, "pad_token_id": 0}
        options |= {"eos_token_id": subject.tokenizer.eos_token_id}
        with torch.inference_mode():
            for start, end in zip([0, *item.data["ends"]], item.data["ends"], strict=False):
                subject.model(input_ids=ids[:, start:end], past_key_values=cache)
            held = cache.report()
            new = subject.model.generate(ids, past_key_values=cache, **options)[0, ids.shape[1] :]
        assert outcome.details["answer"] == subject.tokenizer.decode(new, skip_special_tokens=True)
        assert outcome.metrics["held"] == pytest.approx(held.used_bytes / held.full_bytes)
        assert outcome.kept_ratio == pytest.approx(1 if isinstance(policy, Full) else 0.3, abs=0.01)


def test_what_is_expected_is_found(subject):
    item = TURNS.items(subject.tokenizer)[0]
    answer = TURNS.measure(subject, item, FULL_CACHE, None).details["answer"]
    known = replace(item, data=item.data | {"expected": [answer.strip()]})
    assert TURNS.measure(subject, known, FULL_CACHE, None).metrics["recall"] == 1


def test_without_a_chat_template_turns_are_plain_text():
    ids, ends = encode_chat(chatty.tokenizer(chat=False), ["The cat sat.", "Who sat?"], "It was the")
    text = chatty.tokenizer(chat=False).decode(ids)
    assert text == "The cat sat.\n\nI see.\n\nQuestion: Who sat?\nAnswer: It was the"
    assert chatty.tokenizer(chat=False).decode(ids[: ends[0]]).startswith("The cat sat.\n\nI see.")


def test_turns_are_checked():
    with pytest.raises(ConfigurationError, match="kind must be one of facts, tally"):
        Turns(kind="fact")
    with pytest.raises(ConfigurationError, match="turns must be a count from 1 to 30, got 31"):
        Turns(turns=31)


def test_turns_command(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HEADWISE_MODEL", str(folder))
    asked = ("--context", 120, "--turns", 2, "--items", 1, "--new-tokens", 2, "--kind", "tally")
    answer = commands.call("eval", "turns", "--out", tmp_path / "out", *asked, "--policy", "tova:keep=0.5", "--json")
    assert answer.code == 0, answer.err
    (summary,) = answer.json["summaries"]
    assert summary["title"] == "turns: tally of 2"
    assert [row["policy"] for row in summary["rows"]] == ["full", "tova:keep=0.5", "random, size of tova:keep=0.5"]
