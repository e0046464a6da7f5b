"""Generation: files of prompts as others publish them, texts compared, answers judged, programs run within limits."""

from __future__ import annotations

import gzip
import json
import os
import time
from decimal import Decimal
from itertools import combinations
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from headwise import Full, HeadwiseCache, StreamingLLM
from headwise.errors import ConfigurationError, InputError
from headwise.eval import generation
from headwise.eval.answers import MEASURES, final_number, program
from headwise.eval.cache_kinds import FULL_CACHE, PolicyCache
from headwise.eval.generation import Generation
from headwise.eval.greedy import continue_greedily
from headwise.eval.layouts import ALPACA_EVAL, GSM8K, HUMAN_EVAL, find_layout
from headwise.eval.programs import Limits, check_can_run, runs
from headwise.eval.prompt_file import read_records
from headwise.eval.rouge import rouge_l
from headwise.eval.task import Subject

EVICTING = StreamingLLM(window=6, sinks=1)
TEMPLATE = (
    "{% for m in messages %}<user>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"
)

GSM8K_RECORD = {"question": "Two and 3,000?", "answer": "2+3000=<<2+3000=3002>>3,002.\n#### 3,002"}
HUMAN_EVAL_RECORD = {
    "task_id": "Test/0",
    "prompt": 'import math\n\n\ndef half(n):\n    """Half of n."""\n',
    "canonical_solution": "    return n / 2\n",
    "test": "def check(candidate):\n    assert candidate(6) == 3\n",
    "entry_point": "half",
}
ALPACA_RECORD = {"instruction": "Name a colour.", "output": "Blue is one.", "generator": "someone", "dataset": "x"}


@pytest.fixture(scope="module")
def tokenizer():
    """Every byte is a token, so that any text can be encoded and decoded."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {text: token for token, text in enumerate(["<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=words, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def subject(model, tokenizer):
    return Subject(model, tokenizer, {"kernel": "reference", "evict_every": 2})


@pytest.fixture
def write(tmp_path):
    def lines(*records, name="file.jsonl"):
        path = tmp_path / name
        path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
        return path

    return lines


# Files.


def test_records_are_read_from_lines_a_list_or_gzip(tmp_path):
    records = [{"a": 1}, {"b": "x\u2028y"}]
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    contents = {
        "lines.jsonl": lines.encode(),
        "blank.jsonl": f"\ufeff\n{lines}\n\n".encode(),
        "windows.jsonl": lines.replace("\n", "\r\n").encode(),
        "list.json": json.dumps(records).encode(),
        "lines.jsonl.gz": gzip.compress(lines.encode()),
    }
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
        assert read_records(tmp_path / name) == records, name


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b'{"a": 1}\n{"a": \n', "line 2 of .*bad.* is not JSON"),
        (b"[1]", "entry 0 of .* must be a JSON object .* got 1"),
        (b'{"a": 1}\n"text"\n', "line 2 .* got 'text'"),
        (b"[]", "holds no records"),
        (b"", "empty"),
        (b"\xff\xfe", "not UTF-8"),
        (gzip.compress(b'{"a": 1}', mtime=0)[:-9], "broken gzip"),
    ],
)
def test_a_file_that_is_none_says_why(tmp_path, data, says):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(data)
    with pytest.raises(InputError, match=says):
        read_records(path)


def test_published_files_are_recognised():
    assert find_layout(GSM8K_RECORD, None, None) is GSM8K
    assert find_layout(HUMAN_EVAL_RECORD, None, None) is HUMAN_EVAL
    assert find_layout(ALPACA_RECORD, None, None) is ALPACA_EVAL
    # Questions with answers of another kind are no sums.
    with pytest.raises(InputError, match=r"which field is the prompt.*: question, answer;"):
        find_layout({"question": "Who?", "answer": "Ada, in 1843"}, None, None)


def test_fields_of_other_files_are_named():
    record = {"ask": "Who?", "reply": "Ada", "prompt": "p"}
    assert find_layout(record, None, None).prompt == "prompt"
    assert find_layout(record, None, None).measure is None
    layout = find_layout(record, "ask", "reply")
    assert (layout.prompt, layout.answer, layout.measure, layout.chat) == ("ask", "reply", "rouge", True)
    assert find_layout(ALPACA_RECORD, "instruction", None) is ALPACA_EVAL
    assert find_layout(ALPACA_RECORD, None, "dataset").answer == "dataset"
    with pytest.raises(InputError, match="no field 'question' in the file; it has: ask, reply, prompt"):
        find_layout(record, "question", None)


# Texts compared.


def test_rouge_l_by_hand():
    # the, cat, on, mat: 4 of 6 words and of 5.
    assert rouge_l("The cat sat on the mat.", "the CAT is on mat") == pytest.approx(2 * 4 / 11)
    assert rouge_l("a b c", "c b a") == pytest.approx(1 / 3)
    assert rouge_l("", "...") == 1.0
    assert rouge_l("word", "") == 0.0


words = st.lists(st.sampled_from(["a", "b", "cd"]), max_size=6)


@given(words, words)
def test_rouge_l_is_the_longest_common_subsequence(one, other):
    def subsequences(items):
        return {chosen for size in range(len(items) + 1) for chosen in combinations(items, size)}

    longest = max(len(common) for common in subsequences(one) & subsequences(other))
    expected = 2 * longest / (len(one) + len(other)) if one or other else 1.0
    assert rouge_l(" ".join(one), " ".join(other)) == pytest.approx(expected)


# Answers judged.


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 9 * 2 = <<9*2=18>>18 dollars.\n#### 18", "18"),
        ("#### 1,234,567.50 and 3 more", "1234567.5"),
        ("####$-5", "-5"),
        ("#### −7", "-7"),
        ("first #### 1\nthen #### 2", "2"),
        ("The answer is 42.", "42"),
        ("16-3=13", "13"),
        ("it fell to -4 degrees", "-4"),
        ("from 10-5", "5"),
        ("It costs $1,080.", "1080"),
        ("between 2, 3 and 4,000", "4000"),
        ("in 2020,500 people", "500"),
        ("no thousands: 1,2345", "2345"),
        ("a share of .5", "0.5"),
        ("3.0", "3"),
        ("-$20", "-20"),
        ("**18**", "18"),
        ("\\boxed{18}", "18"),
        ("none at all. #### ", None),
        ("no idea...", None),
        ("", None),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


def test_measures_of_answers():
    number, rouge, code = (MEASURES[name].score for name in ("number", "rouge", "code"))
    assert number(GSM8K_RECORD, "That makes 3002.00!") == 1.0
    assert number(GSM8K_RECORD, "That makes 3003.") == 0.0
    assert number({"answer": "none"}, "none") == 0.0
    assert rouge({"answer": "Blue is one."}, "blue") == pytest.approx(2 / 4)
    assert code(HUMAN_EVAL_RECORD, HUMAN_EVAL_RECORD["canonical_solution"]) == 1.0
    assert code(HUMAN_EVAL_RECORD, "    return n\n") == 0.0


def test_program_is_the_body_or_the_whole_function():
    parts = {name: HUMAN_EVAL_RECORD[name] for name in ("prompt", "entry_point", "test")}
    body = program(answer="    n = 2 * n\n\n    return n / 4\nprint(half(1))\n", **parts)
    assert body.startswith(parts["prompt"] + "    n = 2 * n\n\n    return n / 4\n")
    assert "print" not in body
    assert body.endswith("check(half)\n")
    whole = program(answer="Sure!\n```python\ndef half(n):\n    return n / 2\n```\nDone.", **parts)
    assert whole.startswith("import math\n\n\ndef half(n):\n    return n / 2\n")
    assert "Sure" not in whole and "Done" not in whole
    other = program(answer="    return 1\n```python\nprint(2)\n```", **parts)
    assert other.startswith(parts["prompt"] + "    return 1")


# Programs.


QUICK = Limits(seconds=2, memory_bytes=2**29, output_bytes=2**16)


@pytest.mark.parametrize(
    ("source", "passes"),
    [
        ("assert 1 + 1 == 2", True),
        ("print('x' * 1000)", True),
        ("assert __name__ == '__main__'", True),
        ("assert False", False),
        ("import sys; sys.exit(0)", False),
        ("import os; os._exit(0)", False),
        ("def (", False),
        ("while True: pass", False),
        ("import time; time.sleep(60)", False),
        ("x = bytearray(2**30)", False),
        ("print('x' * 2**17)", False),
        ("import os; assert 'HEADWISE_TEST_SECRET' not in os.environ", True),
        ("import sys; assert sys.stdin.read() == ''", True),
        ("'\udc80'", True),
    ],
)
def test_programs_run_within_limits(source, passes, monkeypatch):
    monkeypatch.setenv("HEADWISE_TEST_SECRET", "1")
    started = time.perf_counter()
    assert runs(source, QUICK) is passes
    assert time.perf_counter() - started < 20


def test_what_a_program_starts_ends_with_it(tmp_path):
    noted = tmp_path / "pid"
    source = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(noted)!r}, "w").write(str(child.pid))
"""
    assert runs(source, QUICK)
    # Killed, and soon collected by whoever has taken it over.
    status = Path(f"/proc/{noted.read_text()}/status")
    deadline = time.perf_counter() + 10
    while status.exists() and "(zombie)" not in status.read_text() and time.perf_counter() < deadline:
        time.sleep(0.05)
    assert not status.exists() or "(zombie)" in status.read_text()


def test_programs_are_refused_where_they_cannot_run():
    check_can_run(QUICK)
    with pytest.raises(ConfigurationError, match="cannot be run here"):
        check_can_run(Limits(memory_bytes=2**20))


# Greedy.


def test_greedy_is_what_generate_writes(subject, tokenizer):
    ids = torch.tensor([tokenizer("A prompt of some length, to be continued.")["input_ids"]])
    for policy in (Full(), EVICTING):
        new = continue_greedily(subject, subject.read(ids, PolicyCache(policy)), 12)
        cache = HeadwiseCache(subject.model, policy, **subject.options)
        expected = subject.model.generate(ids, past_key_values=cache, do_sample=False, max_new_tokens=12)
        assert new == expected[0, ids.shape[1] :].tolist(), policy
        if policy == Full():
            stock = subject.model.generate(ids, past_key_values=DynamicCache(), do_sample=False, max_new_tokens=12)
            assert new == stock[0, ids.shape[1] :].tolist()


def test_greedy_ends_with_the_token_that_ends_a_text(subject, tokenizer, monkeypatch):
    ids = torch.tensor([tokenizer("Something else.")["input_ids"]])
    new = continue_greedily(subject, subject.read(ids, FULL_CACHE), 12)
    place = next(i for i, token in enumerate(new) if token not in new[:i] and i >= 3)
    for ends in (new[place], [0, new[place]]):
        monkeypatch.setattr(subject.model.generation_config, "eos_token_id", ends)
        assert continue_greedily(subject, subject.read(ids, FULL_CACHE), 12) == new[: place + 1]
    assert continue_greedily(subject, subject.read(ids, FULL_CACHE), 1) == new[:1]


# The task.


def measured(subject, task, policy):
    (item,) = task.items(subject.tokenizer)
    return task.measure(subject, item, PolicyCache(policy), task.reference(subject, item))


def test_the_full_cache_writes_what_it_is_compared_with(subject, write):
    outcome = measured(subject, Generation(write(GSM8K_RECORD), max_new_tokens=9), Full())
    assert outcome.metrics == {"exact_match": 1.0, "first_difference": 9.0, "rouge_l": 1.0, "answer": 0.0}
    assert outcome.kept_ratio == 1.0
    assert outcome.details["new_tokens"] == 9


def test_a_compressed_cache_is_compared_token_by_token(subject, tokenizer, write):
    task = Generation(write({"prompt": "a long enough prompt for a window of six tokens"}), max_new_tokens=16)
    (item,) = task.items(tokenizer)
    reference = task.reference(subject, item)
    outcome = task.measure(subject, item, PolicyCache(EVICTING), reference)
    ids = torch.tensor([item.data["ids"]])
    cache = HeadwiseCache(subject.model, EVICTING, **subject.options)
    new = subject.model.generate(ids, past_key_values=cache, do_sample=False, max_new_tokens=16)[0, ids.shape[1] :]
    agree = next(i for i, (one, other) in enumerate(zip(new.tolist(), reference, strict=True)) if one != other)
    # The first token comes from the pass that reads the prompt, before anything is dropped.
    assert agree >= 1
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in (new.tolist(), reference)]
    assert outcome.metrics == {"exact_match": 0.0, "first_difference": agree, "rouge_l": pytest.approx(rouge_l(*texts))}
    assert outcome.details["text"] == texts[0]
    assert outcome.kept_ratio == pytest.approx(7 / ids.shape[1])
    assert 0 < outcome.used_bytes < outcome.full_bytes
    assert task.query == "aware"


def answering(monkeypatch, tokenizer, text):
    """Whatever the model is asked, that is what it writes."""
    monkeypatch.setattr(generation, "continue_greedily", lambda *_: tokenizer(text)["input_ids"])


def test_answers_are_judged_by_what_suits_the_file(subject, tokenizer, write, monkeypatch):
    answering(monkeypatch, tokenizer, "It is 3,002")
    assert measured(subject, Generation(write(GSM8K_RECORD)), Full()).metrics["answer"] == 1.0
    answering(monkeypatch, tokenizer, "Blue")
    metrics = measured(subject, Generation(write(ALPACA_RECORD)), Full()).metrics
    assert metrics["reference_rouge_l"] == pytest.approx(2 / 4)
    answering(monkeypatch, tokenizer, HUMAN_EVAL_RECORD["canonical_solution"] + "\nprint()")
    path = write(HUMAN_EVAL_RECORD)
    assert measured(subject, Generation(path, run_code=True), Full()).metrics["pass_at_1"] == 1.0
    # Nothing is run unless it is allowed.
    monkeypatch.setattr("headwise.eval.answers.runs", lambda *_: pytest.fail("ran"))
    assert measured(subject, Generation(path), Full()).metrics.keys() == {"exact_match", "first_difference", "rouge_l"}
    assert "answer" not in measured(subject, Generation(write(GSM8K_RECORD), metric="none"), Full()).metrics


def test_a_chat_template_is_used_where_it_suits(write, tokenizer, monkeypatch):
    def prompts(record, **options):
        return [tokenizer.decode(item.data["ids"]) for item in Generation(write(record), **options).items(tokenizer)]

    assert prompts(ALPACA_RECORD) == ["Name a colour."]
    with pytest.raises(InputError, match="no chat template"):
        prompts(ALPACA_RECORD, template="chat")
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    assert prompts(ALPACA_RECORD) == ["<user>Name a colour.<answer>"]
    assert prompts(ALPACA_RECORD, template="raw") == ["Name a colour."]
    assert prompts(HUMAN_EVAL_RECORD) == [HUMAN_EVAL_RECORD["prompt"]]
    assert prompts(HUMAN_EVAL_RECORD, template="chat") == [f"<user>{HUMAN_EVAL_RECORD['prompt']}<answer>"]


def test_a_prefix_comes_before_every_prompt(write, tokenizer, tmp_path):
    prefix = tmp_path / "examples.txt"
    prefix.write_text("An example.\n")
    items = Generation(write({"prompt": "One"}, {"prompt": "Two"}), prefix=prefix).items(tokenizer)
    assert [tokenizer.decode(item.data["ids"]) for item in items] == ["An example.\n\nOne", "An example.\n\nTwo"]


def test_items_are_the_first_that_are_short_enough(write, tokenizer):
    path = write(*({"prompt": "x" * length} for length in (5, 50, 6, 7)))
    items = Generation(path, limit=2, max_prompt_tokens=10).items(tokenizer)
    assert [(item.key, len(item.data["ids"])) for item in items] == [
        ("record 1 of file.jsonl", 5),
        ("record 3 of file.jsonl", 6),
    ]
    assert items[0].digest != items[1].digest
    assert [item.digest for item in Generation(path).items(tokenizer)][::2] == [item.digest for item in items]
    json.dumps([item.data for item in items])
    with pytest.raises(InputError, match=r"every prompt of .* is longer than 4 tokens"):
        Generation(path, max_prompt_tokens=4).items(tokenizer)


def test_a_prompt_that_the_model_has_no_room_for_is_refused(subject, write):
    task = Generation(write({"prompt": "x" * 250}), max_new_tokens=10)
    with pytest.raises(InputError, match="260 tokens do not fit into the model's 256 positions"):
        measured(subject, task, Full())


def test_words_of_a_tokenizer_that_drops_the_first_space_stay_apart(tokenizer, monkeypatch):
    ids = [tokenizer(text)["input_ids"] for text in ("def f():\n", "    return 1")]
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda *given, **options: decode(*given, **options).removeprefix(" "))
    assert generation._decode(tokenizer, *ids) == "    return 1"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"limit": 0}, "limit must be a count of 1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a count"),
        ({"metric": "bleu"}, "metric must be one of auto, none, number, rouge, code"),
        ({"metric": "code"}, "allow it with run_code"),
    ],
)
def test_options_out_of_range_are_refused(write, options, says):
    with pytest.raises(ConfigurationError, match=says):
        Generation(write(ALPACA_RECORD), **options)


@pytest.mark.parametrize(
    ("records", "options", "says"),
    [
        ([{"prompt": 1.5}, {"prompt": None}], {}, "record 2 .* field 'prompt' must be text, got None"),
        ([{"prompt": "a"}], {"metric": "rouge"}, "name its field as answer_field"),
        ([GSM8K_RECORD, {**GSM8K_RECORD, "answer": "many"}], {}, "record 2 .* metric 'number' finds nothing"),
        ([{"prompt": "a"}], {"metric": "code", "run_code": True}, "field 'test' must be text"),
    ],
)
def test_records_that_cannot_be_used_are_refused(write, tokenizer, records, options, says):
    with pytest.raises(InputError, match=says):
        Generation(write(*records), **options).items(tokenizer)


def test_rouge_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(os.sys.modules, "rapidfuzz.distance", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'headwise\[eval\]'"):
        rouge_l("a", "b")
