"""Fidelity, recall and synthetic tasks, against plain computations of the same thing."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache, QuantizedCache

import chatty
from headwise import HeadwiseCache
from headwise.errors import ConfigurationError, InputError
from headwise.eval.cache_kinds import FULL_CACHE, PolicyCache, StockQuantized
from headwise.eval.fidelity import Fidelity, compare
from headwise.eval.recall import Recall
from headwise.eval.synthetic import KINDS, Synthetic
from headwise.eval.task import Subject
from headwise.policies import Full, Random, Window

CONTEXT, STEPS = 40, 6

pytestmark = pytest.mark.usefixtures("short_manual")

FIDELITY = Fidelity(context=CONTEXT, steps=STEPS, passages=2)


@pytest.fixture(scope="module")
def subject():
    return Subject(chatty.model(2048), chatty.tokenizer(), {"evict_every": 2})


# fidelity


def test_metrics_of_hand_made_predictions():
    full = torch.tensor([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]]).log()
    ours = torch.tensor([[0.25, 0.5, 0.25], [0.8, 0.1, 0.1]]).log()
    metrics, nll = compare(full, ours, torch.tensor([0, 0]))
    assert metrics["kl"] == pytest.approx((0.5 * math.log(2) + 0.25 * math.log(0.5)) / 2)
    assert metrics["nll_change"] == pytest.approx(math.log(2) / 2)
    assert metrics["perplexity_ratio"] == pytest.approx(math.sqrt(2))
    assert metrics["top1"] == 0.5
    assert nll == pytest.approx(-(math.log(0.25) + math.log(0.8)) / 2)


def one_by_one(model, ids, cache):
    """Log-probabilities after each token behind the context."""
    with torch.inference_mode():
        model(input_ids=ids[:, :CONTEXT], past_key_values=cache)
        fed = [model(input_ids=token, past_key_values=cache) for token in ids[:, CONTEXT:-1].split(1, dim=1)]
    return torch.cat([output.logits[:, -1] for output in fed]).float().log_softmax(dim=-1)


@pytest.mark.parametrize("policy", [Window(8), Random(0.3), Full()], ids=str)
def test_fidelity_is_that_of_feeding_token_by_token(subject, policy):
    item = FIDELITY.items(subject.tokenizer)[1]
    assert len(item.data["ids"]) == CONTEXT + STEPS + 1
    ids = torch.tensor([item.data["ids"]])
    full = one_by_one(subject.model, ids, DynamicCache(config=subject.model.config))
    ours = one_by_one(subject.model, ids, HeadwiseCache(subject.model, policy, evict_every=2))
    targets = ids[0, CONTEXT + 1 :, None]
    assert len(targets) == STEPS
    reference = FIDELITY.reference(subject, item)
    torch.testing.assert_close(reference, full, atol=2e-5, rtol=1e-5)
    outcome = FIDELITY.measure(subject, item, PolicyCache(policy), reference)
    kl = (full.exp() * (full - ours)).sum(dim=-1).mean()
    change = (full - ours).gather(1, targets).mean()
    assert outcome.metrics["kl"] == pytest.approx(float(kl), abs=2e-5)
    assert outcome.metrics["nll_change"] == pytest.approx(float(change), abs=2e-5)
    assert outcome.metrics["top1"] == float((full.argmax(-1) == ours.argmax(-1)).float().mean())
    assert outcome.details["document"] == "Python's manual of topics"
    if isinstance(policy, Full):
        assert outcome.metrics["kl"] < 1e-5
        assert (outcome.kept_ratio, outcome.metrics["top1"]) == (1, 1)
        assert outcome.used_bytes >= outcome.full_bytes
    else:
        assert outcome.metrics["kl"] > 1e-3
        assert outcome.kept_ratio < 0.4
        assert outcome.used_bytes < outcome.full_bytes / 2
    assert 0 < outcome.compress_seconds < outcome.prefill_seconds


def test_transformers_own_cache_is_measured_like_the_others(subject):
    try:
        cache = QuantizedCache("fp8", subject.model.config)
    except ValueError:
        pytest.skip("this release of transformers has no fp8 cache")
    item = FIDELITY.items(subject.tokenizer)[1]
    ids, reference = torch.tensor([item.data["ids"]]), FIDELITY.reference(subject, item)
    outcome = FIDELITY.measure(subject, item, StockQuantized("fp8"), reference)
    theirs = one_by_one(subject.model, ids, cache)
    kl = (reference.exp() * (reference - theirs)).sum(dim=-1).mean()
    assert outcome.metrics["kl"] == pytest.approx(float(kl), rel=1e-3)
    assert outcome.metrics["kl"] > 1e-6
    config = subject.model.config
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * CONTEXT * config.head_dim
    assert (outcome.kept_ratio, outcome.full_bytes) == (1, numbers * 4)
    # A byte for each number, and a scale for the keys and one for the values of a layer.
    assert outcome.used_bytes == numbers + 2 * config.num_hidden_layers * 4


def test_fidelity_evicts_while_the_rest_is_fed(subject):
    item = FIDELITY.items(subject.tokenizer)[0]
    reference = FIDELITY.reference(subject, item)
    often = replace(subject, options={"evict_every": 1})
    assert FIDELITY.measure(often, item, PolicyCache(Window(8)), reference).metrics["kl"] != pytest.approx(
        FIDELITY.measure(subject, item, PolicyCache(Window(8)), reference).metrics["kl"], abs=1e-6
    )


def test_a_first_token_is_part_of_the_context(subject):
    plain, marked = (
        task.items(subject.tokenizer) for task in (FIDELITY, replace(FIDELITY, first_token=5, context=CONTEXT + 1))
    )
    assert [item.data["ids"] for item in marked] == [[5, *item.data["ids"]] for item in plain]
    bos = replace(FIDELITY, first_token="bos").items(subject.tokenizer)[0].data["ids"]
    assert (bos[0], len(bos)) == (subject.tokenizer.bos_token_id, CONTEXT + STEPS + 1)
    for wrong in ("eos", 10**6, -1):
        with pytest.raises(ConfigurationError, match="first token must be"):
            replace(FIDELITY, first_token=wrong).items(subject.tokenizer)


def test_every_file_has_its_passages(subject, tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(f"{name} {chatty.TEXT}" * 8, encoding="utf-8")
    items = replace(FIDELITY, files=(tmp_path / "a", tmp_path / "b")).items(subject.tokenizer)
    assert [item.data["document"] for item in items] == [str(tmp_path / name) for name in "aabb"]
    assert len({item.key for item in items}) == len({item.digest for item in items}) == 4


def test_what_does_not_fit_is_refused(subject):
    (item,) = replace(FIDELITY, passages=1).items(subject.tokenizer)
    item.data["ids"] *= 50
    with pytest.raises(InputError, match="2,349 tokens do not fit into the model's 2,048"):
        FIDELITY.reference(subject, item)
    with pytest.raises(ConfigurationError, match="steps must be a count of 1 or more"):
        Fidelity(steps=0)


# recall and synthetic

RECALL = Recall(context=300, count=3, new_tokens=5)


def test_facts_are_in_the_text_and_one_is_asked_for(subject):
    for item in RECALL.items(subject.tokenizer):
        context = subject.tokenizer.decode(item.data["ids"][: item.data["context"]])
        rest = subject.tokenizer.decode(item.data["ids"][item.data["context"] :])
        facts = dict(re.findall(r"The secret number of the (\w+) is (\d{5})\.", context))
        assert len(facts) == 4
        asked = re.search(r"secret number of the (\w+)\?", rest).group(1)
        assert item.data["expected"] == [facts[asked]]
        where = context.index(f"the {asked} is") / len(context)
        assert item.data["details"]["depth"] == pytest.approx(where, abs=0.3)


@pytest.mark.parametrize("make", [RECALL, *(Synthetic(context=700, count=2, kind=kind) for kind in KINDS)])
def test_both_query_modes_ask_the_same(subject, make):
    aware, agnostic = (replace(make, query=query) for query in ("aware", "agnostic"))
    assert aware.title == agnostic.title
    assert aware.label != agnostic.label
    pairs = list(zip(aware.items(subject.tokenizer), agnostic.items(subject.tokenizer), strict=True))
    assert len(pairs) == make.count
    for seen, unseen in pairs:
        assert seen.data["ids"] == unseen.data["ids"]
        assert seen.data["context"] == len(seen.data["ids"]) > unseen.data["context"]
        assert seen.data["expected"] == unseen.data["expected"]
    again = replace(make).items(subject.tokenizer)
    assert [item.digest for item in again] == [item.digest for _, item in pairs]
    other = replace(make, seed=1).items(subject.tokenizer)
    assert not {item.digest for item in other} & {item.digest for item in again}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_expected_can_be_read_off_the_prompt(subject, kind):
    task = Synthetic(context=900, count=2, kind=kind, needles=3, hops=2)
    for item in task.items(subject.tokenizer):
        text = subject.tokenizer.decode(item.data["ids"])
        assert 850 < len(item.data["ids"]) < 1200
        owner = re.search(r"codes? of (\w+)\?", text)
        if owner is not None:
            answer = re.findall(rf"A code of {owner.group(1)} is (\d+)\.", text)
            assert len(re.findall(r"A code of", text)) == (1 if kind == "single-needle" else 3)
            assert len(answer) == (3 if kind == "multi-value" else 1)
        elif kind == "variables":
            value = re.search(r"have the value (\d+)\?", text).group(1)
            answer, sources = zip(*re.findall(r"Let (\w+) = (\w+)\.", text), strict=True)
            assert sources == (value, *answer[:2])
        else:
            words = text[: text.index("Which ")].split("user\n")[1].split()
            wanted = int(re.search(r"Which (\d+) words", text).group(1))
            answer = sorted(set(words), key=words.count, reverse=True)[:wanted]
        assert sorted(item.data["expected"]) == sorted(answer)


@pytest.mark.parametrize("query", ["aware", "agnostic"])
@pytest.mark.parametrize("policy", [Full(), Window(0.3)], ids=str)
def test_the_answer_is_what_generate_says(subject, query, policy):
    task = replace(RECALL, query=query)
    for item in task.items(subject.tokenizer)[:2]:
        outcome = task.measure(subject, item, PolicyCache(policy), None)
        ids = torch.tensor([item.data["ids"]])
        cache = HeadwiseCache(subject.model, policy, evict_every=2, prompt_tokens=item.data["context"])
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 5, "pad_token_id": 0}
        options |= {"eos_token_id": subject.tokenizer.eos_token_id}
        with torch.inference_mode():
            if query == "agnostic":
                subject.model(input_ids=ids[:, : item.data["context"]], past_key_values=cache)
            new = subject.model.generate(ids, past_key_values=cache, **options)[0, ids.shape[1] :]
        assert outcome.details["answer"] == subject.tokenizer.decode(new, skip_special_tokens=True)
        assert outcome.kept_ratio == pytest.approx(1 if isinstance(policy, Full) else 0.3, abs=0.01)
        read = ids.shape[1] if query == "aware" else item.data["context"]
        assert outcome.full_bytes == 2 * 8 * 4 * chatty.LAYERS * chatty.KV_HEADS * read


def test_recall_is_found_in_the_answer(subject):
    item = RECALL.items(subject.tokenizer)[0]
    outcome = RECALL.measure(subject, item, FULL_CACHE, None)
    assert outcome.metrics == {"recall": 0}
    known = replace(item, data=item.data | {"expected": [outcome.details["answer"].strip(), "12345"]})
    assert RECALL.measure(subject, known, FULL_CACHE, None).metrics == {"recall": 0.5}


def test_questions_are_checked(subject):
    with pytest.raises(ConfigurationError, match="query must be"):
        Recall(query="none")
    with pytest.raises(ConfigurationError, match="facts must be"):
        Recall(facts=99)
    with pytest.raises(ConfigurationError, match="kind must be one of single-needle"):
        Synthetic(kind="needle")
    with pytest.raises(ConfigurationError, match="too short"):
        Synthetic(kind="common-words", context=20).items(subject.tokenizer)
    item = RECALL.items(subject.tokenizer)[0]
    item = replace(item, data=item.data | {"limit": 2000})
    with pytest.raises(InputError, match="do not fit"):
        RECALL.measure(subject, item, FULL_CACHE, None)
