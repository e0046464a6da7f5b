"""Likelihood: what is scored is predicted on the compressed cache, one token after another."""

from __future__ import annotations

import pytest
import torch

import tiny
from headwise import H2O, FastGen, Full, HeadwiseCache, StreamingLLM
from headwise.eval.likelihood import Score, Stretch, cut, score
from headwise.eval.task import Subject

POLICIES = [
    StreamingLLM(window=5, sinks=1),
    H2O(heavy=0.3, recent=0.2),
    FastGen(recovery=0.5, local=0.2, frequent=0.2),
]


@pytest.fixture(scope="module")
def model():
    return tiny.llama(seed=2, layers=2)


def subject(model, every=3, kernel="reference"):
    return Subject(model, tiny.tokenizer(), {"kernel": kernel, "evict_every": every})


def some_ids(length, seed=0):
    return tiny.prompt(length, seed=seed)[0].tolist()


def scored(subject, policy, stretches):
    """In the order of the stretches, and how many prompts were compressed."""
    reports = []
    found = dict(score(subject, policy, stretches, reports.append))
    return [found[place] for place in range(len(stretches))], reports


def plainly(model, context, continuation):
    """From one pass over everything, as the harness's own model does it."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([context + continuation[:-1]])).logits[0, -len(continuation) :]
    return against(logits, continuation)


def by_hand(subject, policy, context, continuation):
    """Prompt, compression, then token by token."""
    cache = HeadwiseCache(
        subject.model, policy, tokenizer=subject.tokenizer, prompt_tokens=len(context) - 1, **subject.options
    )
    rows = []
    with torch.inference_mode():
        subject.model(input_ids=torch.tensor([context[:-1]]), past_key_values=cache)
        for token in [context[-1], *continuation[:-1]]:
            rows.append(subject.model(input_ids=torch.tensor([[token]]), past_key_values=cache).logits[0, -1])
    return against(torch.stack(rows), continuation)


def against(logits, continuation):
    rows = logits.log_softmax(dim=-1)
    greedy = rows.argmax(dim=-1).tolist() == continuation
    return Score(sum(float(row[token]) for row, token in zip(rows, continuation, strict=True)), greedy)


def assert_close(found, expected):
    assert found.log_likelihood == pytest.approx(expected.log_likelihood, abs=1e-4)
    assert found.greedy == expected.greedy


@pytest.mark.parametrize(
    ("context", "continuation", "prompt", "expected"),
    [
        ([1, 2, 3], [4, 5], 0, Stretch((1, 2), (3, 4), (4, 5))),
        ([1, 2, 3], [4], 0, Stretch((1, 2), (3,), (4,))),
        ([1, 2], [4], 0, Stretch((1,), (2,), (4,))),
        ([1], [4], 0, Stretch((1,), (), (4,))),
        ([1], [4, 5, 6], 0, Stretch((1,), (4, 5), (4, 5, 6))),
        ([1], [4, 5, 6, 7], 0.5, Stretch((1, 4), (5, 6), (4, 5, 6, 7))),
        ([1], [4, 5, 6, 7], 3, Stretch((1, 4, 5), (6,), (4, 5, 6, 7))),
        ([1], [4, 5], 9, Stretch((1, 4), (), (4, 5))),
        ([1, 2, 3, 4], [5, 6], 0.2, Stretch((1, 2, 3), (4, 5), (5, 6))),
        ([1], [4, 5], 1.0, Stretch((1, 4), (), (4, 5))),
    ],
)
def test_the_prompt_ends_where_it_should(context, continuation, prompt, expected):
    assert cut(context, continuation, prompt) == expected


@pytest.mark.parametrize("continuation", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("context", [1, 2, 30])
def test_the_full_cache_scores_like_one_pass(model, context, continuation):
    ids = some_ids(context + continuation)
    context, continuation = ids[:context], ids[context:]
    (found,), _ = scored(subject(model), Full(), [cut(context, continuation)])
    assert_close(found, plainly(model, context, continuation))


@pytest.mark.parametrize("every", [1, 3, 16])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_a_compressed_cache_scores_as_token_by_token(model, policy, every):
    ids, under_test = some_ids(50, seed=1), subject(model, every)
    for length in (1, every + 1, 14):
        context, continuation = ids[:30], ids[30 : 30 + length]
        (found,), (report,) = scored(under_test, policy, [cut(context, continuation)])
        assert_close(found, by_hand(under_test, policy, context, continuation))
        # Compression is felt from the first token on: choices of one token are decided by nothing else.
        assert abs(found.log_likelihood - plainly(model, context, continuation).log_likelihood) > 1e-3
        assert report.seen_tokens == 29 and report.kept_ratio < 1


def test_what_has_a_prompt_in_common_is_read_once(model):
    ids, policy, under_test = some_ids(60, seed=3), POLICIES[1], subject(model)
    contexts = [ids[:20], ids[:20], ids[:20], ids[:20], [*ids[:19], 77], ids[20:40], ids[:1]]
    continuations = [ids[40:41], ids[41:42], ids[42:47], ids[42:48], ids[48:50], ids[42:47], ids[1:4]]
    stretches = [cut(c, k) for c, k in zip(contexts, continuations, strict=True)]
    passes = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: passes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    together, reports = scored(under_test, policy, stretches)
    handle.remove()
    assert len(reports) == 3
    # Two choices of one token are one pass; then five tokens, six, and two behind another last token; and so on.
    assert passes == [19, 1, *[3, 2], *[3, 3], 2, 19, *[3, 2], 1, 2]
    for stretch, found in zip(stretches, together, strict=True):
        assert_close(found, scored(under_test, policy, [stretch])[0][0])


def test_text_without_context_is_read_up_to_a_share_of_it(model):
    ids, policy, under_test = some_ids(31, seed=4), POLICIES[0], subject(model)
    (full,), _ = scored(under_test, Full(), [cut(ids[:1], ids[1:], 0.5)])
    assert_close(full, plainly(model, ids[:1], ids[1:]))
    (found,), (report,) = scored(under_test, policy, [cut(ids[:1], ids[1:], 0.5)])
    head, tail = plainly(model, ids[:1], ids[1:16]), by_hand(under_test, policy, ids[:16], ids[16:])
    assert report.seen_tokens == 15
    assert found.log_likelihood == pytest.approx(head.log_likelihood + tail.log_likelihood, abs=1e-4)


def test_greedy_is_the_likeliest_token_in_every_place(model):
    context = some_ids(12, seed=5)
    with torch.inference_mode():
        written = model.generate(torch.tensor([context]), do_sample=False, max_new_tokens=4)[0, 12:].tolist()
    wrong = [*written[:3], (written[3] + 1) % tiny.VOCABULARY]
    found, _ = scored(subject(model), Full(), [cut(context, written), cut(context, wrong)])
    assert [each.greedy for each in found] == [True, False]


def test_the_compiled_kernels_agree(model):
    ids, policy = some_ids(40, seed=6), POLICIES[1]
    stretches = [cut(ids[:30], ids[30:])]
    (expected,), _ = scored(subject(model), policy, stretches)
    (found,), _ = scored(subject(model, kernel="cpu"), policy, stretches)
    assert_close(found, expected)
