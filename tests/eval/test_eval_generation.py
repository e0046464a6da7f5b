"""Generation: greedy answers to a file's prompts, compared with those of the full cache."""

from __future__ import annotations

import json

import pytest
import torch
from evaluating import (
    ALPACA_RECORD,
    GSM8K_RECORD,
    HUMAN_EVAL_RECORD,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from headwise import Full, HeadwiseCache, StreamingLLM
from headwise.errors import ConfigurationError, InputError
from headwise.eval import generation
from headwise.eval.cache_kinds import FULL_CACHE, PolicyCache
from headwise.eval.generation import Generation
from headwise.eval.greedy import continue_greedily
from headwise.eval.rouge import rouge_l
from headwise.eval.task import Subject

EVICTING = StreamingLLM(window=6, sinks=1)

TEMPLATE = (
    "{% for m in messages %}<user>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"
)


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
