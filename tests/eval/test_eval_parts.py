"""What evaluations are made of: specs, texts, made-up words, intervals, scores and tables."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

import chatty
from headwise.errors import ConfigurationError, InputError, UnknownPolicyError
from headwise.eval.cache_kinds import FULL_CACHE, PolicyCache, StockQuantized
from headwise.eval.contenders import make_contenders
from headwise.eval.haystack import made_words, noise, token_count, word_list, zipf_words
from headwise.eval.question import Question, encode_question, found
from headwise.eval.statistics import Estimate, estimate
from headwise.eval.tables import BETTER, WORSE, make_grids
from headwise.measure.texts import Document, plant, read_documents, take_passages
from headwise.policies import H2O, FastGen, Full, Policy, Random, Window
from headwise.policies.words import parse_policy

TOKENIZER = chatty.tokenizer()


# specs and lineups


def test_a_spec_is_a_policy():
    assert parse_policy("h2o:heavy=0.25,recent=64") == H2O(0.25, 64)
    assert parse_policy(" full ") == Full()
    assert parse_policy("fastgen") == FastGen(0.95)
    assert parse_policy("fastgen:ladder=special,full,recovery=0.5") == FastGen(0.5, ladder=("special", "full"))


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("h2o:heavy=0.5", "needs parameter recent=VALUE"),
        ("window:", "parameter takes NAME=VALUE"),
        ("window:size", "parameter takes NAME=VALUE"),
        ("window:size=x", "parameter size=x: expected a number"),
        ("window:size=1,size=2", "given twice"),
        ("window:sise=1", "no parameter 'sise'"),
    ],
)
def test_bad_specs(spec, says):
    with pytest.raises(ConfigurationError, match=says) as error:
        parse_policy(spec)
    assert "--set" not in str(error.value)


def test_unknown_policy_in_a_spec():
    with pytest.raises(UnknownPolicyError, match="window"):
        parse_policy("windwo:size=3")


def test_random_stands_behind_every_policy_and_has_its_size():
    made = make_contenders(["window:size=3", "full", "random:keep=0.5"], seed=9)
    assert [contender.label for contender in made] == [
        "full",
        "window:size=3",
        "random, size of window:size=3",
        "random:keep=0.5",
    ]
    kept = {"full": 1.0, "window:size=3": 0.125}
    model = chatty.model(64)
    assert [contender.cache_kind(model, kept) for contender in made] == [
        FULL_CACHE,
        PolicyCache(Window(3)),
        PolicyCache(Random(keep=0.125, seed=9)),
        PolicyCache(Random(keep=0.5)),
    ]
    assert [e.label for e in make_contenders(["window:size=3"], random=False)] == ["full", "window:size=3"]
    with pytest.raises(ConfigurationError, match="given twice"):
        make_contenders(["fastgen", "fastgen:recovery=0.95"])


def test_the_cache_of_transformers_is_one_row_without_a_draw():
    made = make_contenders(["transformers:quanto-int4", "transformers:fp8"])
    model = chatty.model(64)
    assert [each.cache_kind(model, {}) for each in made[1:]] == [StockQuantized("quanto", 4), StockQuantized("fp8")]
    assert made[1].describe()["policy"] == {"name": "transformers", "parameters": {"backend": "quanto", "bits": 4}}
    assert [str(each.cache_kind(model, {})) for each in made[1:]] == [
        "StockQuantized(backend='quanto', bits=4)",
        "StockQuantized(backend='fp8')",
    ]
    for wrong in ("quanto", "quanto-int9", "fp8-int4", "fp16", ""):
        with pytest.raises(ConfigurationError, match="transformers: takes quanto-int4"):
            make_contenders([f"transformers:{wrong}"])


def test_the_cache_of_transformers_cannot_be_headwises():
    assert not isinstance(StockQuantized("fp8"), Policy)
    with pytest.raises(UnknownPolicyError, match="transformers"):
        parse_policy("transformers")


# texts


def test_passages_lie_at_equal_steps_through_a_text():
    text = "".join(chr(ord("a") + index % 26) for index in range(101))
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    passages = take_passages(TOKENIZER, [Document("letters", text)], 21, 5)
    starts = [passage.start for passage in passages]
    step = (len(ids) - 21) // 5
    assert step > 0 and starts == [0, step, 2 * step, 3 * step, 4 * step]
    for passage in passages:
        assert passage.ids == ids[passage.start : passage.start + 21]
        assert passage.document == "letters"
    assert [p.start for p in take_passages(TOKENIZER, [Document("letters", text)], 21, 1)] == [0]


def test_a_text_too_short_is_refused_with_its_length():
    ids = TOKENIZER(chatty.TEXT, add_special_tokens=False)["input_ids"]
    document = Document("cats", chatty.TEXT)
    assert [p.start for p in take_passages(TOKENIZER, [document], len(ids) - 3, 3)] == [0, 1, 2]
    assert [p.start for p in take_passages(TOKENIZER, [document], len(ids), 1)] == [0]
    with pytest.raises(InputError, match=f"cats has {len(ids)} tokens, too few for 4 passages"):
        take_passages(TOKENIZER, [document], len(ids) - 3, 4)


def test_documents_come_from_files_or_the_manual(tmp_path):
    file = tmp_path / "wiki.txt"
    file.write_text("a well @-@ known <unk> 1 @,@ 234 @.@ 5 at @-@home", encoding="utf-8")
    assert read_documents([file])[0].text == file.read_text(encoding="utf-8")
    assert read_documents([file], undo_marks=True) == [Document(str(file), "a well-known unknown 1,234.5 at @-@home")]
    assert "assert" in read_documents([])[0].text
    with pytest.raises(InputError, match="no file"):
        read_documents([tmp_path / "none.txt"])


def test_planted_sentences_stand_between_others_in_their_order():
    text = "One. Two. Three.\nFour! Five"
    planted, depths = plant(text, ["X.", "Y."], random.Random(2))
    assert planted.replace("X. ", "").replace("Y. ", "") == text
    assert planted.index("X. ") < planted.index("Y. ")
    assert 0 < depths[0] < depths[1] <= 1
    for sentence in ("X. ", "Y. "):
        assert planted[planted.index(sentence) - 2] in ".!" or planted[planted.index(sentence) - 1] == "\n"
    assert {plant(text, ["X."], random.Random(seed))[1][0] for seed in range(40)} == {5 / 23, 10 / 23, 17 / 23, 1.0}
    with pytest.raises(InputError, match="5 sentences do not fit"):
        plant(text, ["X."] * 5, random.Random(0))


# made-up text


def test_noise_has_the_length_asked_for():
    text = noise(TOKENIZER, random.Random(1), 500)
    assert 500 <= token_count(TOKENIZER, text) < 560
    assert text != noise(TOKENIZER, random.Random(2), 500)


def test_made_words_differ():
    words = made_words(random.Random(0), 500)
    assert len(set(words)) == 500
    assert all(word.isalpha() and len(word) == 6 for word in words)


def test_common_words_occur_ten_times_as_often_as_all_others():
    text, common = word_list(TOKENIZER, random.Random(4), 2000, 4)
    counts = Counter(text.split())
    often = {counts[word] for word in common}
    seldom = {count for word, count in counts.items() if word not in common}
    assert len(common) == 4
    assert len(often) == len(seldom) == 1
    assert often.pop() >= 10 * seldom.pop()
    assert 1800 < token_count(TOKENIZER, text) < 2200
    with pytest.raises(ConfigurationError, match="too short"):
        word_list(TOKENIZER, random.Random(4), 50, 10)


def test_frequent_words_follow_the_law():
    text, ranked = zipf_words(TOKENIZER, random.Random(4), 3000)
    counts = Counter(text.split())
    assert [word for word, _ in counts.most_common(len(ranked))] == ranked
    times = [counts[word] for word in ranked]
    assert all(more > less for more, less in pairwise(times))
    assert times[1] == pytest.approx(times[0] / 4, abs=1)
    assert times[2] == pytest.approx(times[0] / 9, abs=1)
    assert 2700 < token_count(TOKENIZER, text) <= 3000


# prompts and scores


@pytest.mark.parametrize("chat", [True, False])
def test_the_context_is_the_prompt_up_to_the_question(chat):
    tokenizer = chatty.tokenizer(chat)
    question = Question("Some text. The cat sat.", "Where is the cat?", "It is", ["mat"])
    ids, context = encode_question(tokenizer, question)
    text = tokenizer.decode(ids)
    before, after = tokenizer.decode(ids[:context]), tokenizer.decode(ids[context:])
    assert before.rstrip().endswith("The cat sat." if chat else "Question:")
    assert "Where is the cat?" in after
    assert before + after == text
    assert ("assistant" in after) == chat
    assert after.endswith("It is") != chat


def test_found_counts_whole_words():
    assert found(["12345"], "it is 12345.") == 1
    assert found(["12345"], "it is 123456") == 0
    assert found(["Cat", "dog", "a.b"], "CAT, axb") == pytest.approx(1 / 3)


# statistics


def test_an_interval_is_that_of_bootstrap_means():
    values = [0.0, 1.0, 4.0, 2.0, 2.0]
    found = estimate(values, seed=5)
    rng = np.random.default_rng(77)
    means = [rng.choice(values, len(values)).mean() for _ in range(4000)]
    assert found.mean == pytest.approx(1.8)
    assert found.low == pytest.approx(np.quantile(means, 0.025), abs=0.15)
    assert found.high == pytest.approx(np.quantile(means, 0.975), abs=0.15)
    assert found == estimate(values, seed=5)
    assert found != estimate([*values, 9.0], seed=5)


def test_one_value_and_equal_values():
    assert estimate([3.0], seed=0) == Estimate(3.0, None, None)
    assert estimate([3.0, 3.0], seed=0) == Estimate(3.0, 3.0, 3.0)


# tables


def row(policy, value, gain=None, **more):
    over = None if gain is None else {"mean": sum(gain) / 2, "low": gain[0], "high": gain[1]}
    costs = {"kept_ratio": 0.25, "used_bytes": 2048.0, "compress_seconds": 0.5}
    metrics = {"recall": {"mean": value, "low": value - 0.125, "high": value + 0.125}}
    return {"policy": policy, "twin_of": None, "items": 8, "metrics": metrics, "over_random": over} | costs | more


def summary(query, rows, higher=True):
    return {"title": "t", "query": query, "primary": "recall", "higher_is_better": higher, "rows": rows}


def test_query_modes_have_columns_of_their_own():
    agnostic = summary(
        "agnostic", [row("full", 0.75), row("p", 0.5, (0.1, 0.2)), row("q", 0.5, (-0.1, 0.2), twin_of="p")]
    )
    aware = summary("aware", [row("full", 0.875), row("p", 0.25, (-0.2, -0.1))])
    (grid,) = make_grids([agnostic, aware])
    assert grid.title == "t, 8 items"
    heads = ["recall", "kept", "compress"]
    assert grid.columns == ["policy", *(f"{h}\n{q}" for q in ("agnostic", "aware") for h in heads)]
    costs = ["25.0%, 2.0 KiB", "0.50 s"]
    twin = "  same size at random"
    assert grid.rows == [
        ["full", "0.75 [0.625, 0.875]", *costs, "0.875 [0.75, 1]", *costs],
        ["p", f"0.5{BETTER} [0.375, 0.625]", *costs, f"0.25{WORSE} [0.125, 0.375]", *costs],
        [twin, "0.5 [0.375, 0.625]", *costs, *["-"] * 3],
    ]


def test_less_is_better_where_it_is():
    (grid,) = make_grids([summary("none", [row("p", 0.5, (-0.2, -0.1)), row("q", 0.5, (0.1, 0.2))], higher=False)])
    assert [cells[1].split()[0] for cells in grid.rows] == [f"0.5{BETTER}", f"0.5{WORSE}"]
    assert grid.columns[1] == "recall"
