"""The generate() matrix: ten model configurations by ten modes, with nothing evicted and with policies that evict."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import pytest
import torch

import headwise
import models
import tiny
from cases import EVERYTHING
from headwise import HeadwiseWarning, UnsupportedModelError
from matrix_policies import EXACT_LADDER, policy_of
from models import ALL_SLIDING, COMPRESSIBLE, FAMILIES, MODES, NEW, PADDING, PROMPT, TURN

TOKENIZER = tiny.tokenizer()

FIXED_SIZES = {"streamingllm": 10, "h2o": 11, "random": 11}
EVICTING = ["fastgen-exact", "fastgen", *FIXED_SIZES]


def cases(*modes):
    """(family, policy, mode): the exact policy in every case, and the others in turn.

    Each of the others meets every mode and every family; what they do is the same on every release of transformers.
    """
    exact, *others = EVICTING
    found = [(family, exact, mode) for family in COMPRESSIBLE for mode in modes]
    for mode in modes:
        first = len(others) * list(MODES).index(mode)
        families = [COMPRESSIBLE[(first + turn) % len(COMPRESSIBLE)] for turn in range(len(others))]
        pairs = itertools.product(COMPRESSIBLE, others) if EVERYTHING else zip(families, others, strict=True)
        found += [(family, policy, mode) for family, policy in pairs]
    return [
        pytest.param(*case, id="-".join(case), marks=[] if case[1] == exact else pytest.mark.own)
        for case in sorted(found, key=lambda case: COMPRESSIBLE.index(case[0]))
    ]


@dataclass(frozen=True)
class Run:
    """What came of one call of `generate`, and what its cache says."""

    out: torch.Tensor
    seen: int
    log: models.Log
    kept: list
    rules: list


@functools.cache
def reference(family, mode):
    """The ids with `eager` attention and the cache of transformers."""
    model = models.shared(family)
    assert model.config._attn_implementation == "eager"
    return MODES[mode](model, None)


@functools.cache
def run(family, mode, policy):
    # The look-up prompt is found with stock attention, before headwise is attached.
    models.lookup_prompt(models.shared(family))
    options = {"prompt_tokens": PROMPT} if mode == "chunked" and policy != "full" else {}
    return run_once(family, MODES[mode], policy, **options)


def run_once(family, mode, policy, **options):
    model = models.shared(family)
    cache = models.WatchedCache(model, policy_of(family, policy), tokenizer=TOKENIZER, **options)
    out = mode(model, cache)
    report = cache.report()
    return Run(out, cache.get_seq_length(), cache.log, report.kept_tokens, report.rules)


def pads(mode, rows):
    """Padding columns of every row of the cache; beams of one prompt lie side by side."""
    return [PADDING if mode.startswith("padded") and row < rows // 2 else 0 for row in range(rows)]


def heads(done):
    """(layer, row, head) of every head that headwise compresses, with its kept count and its rule."""
    for layer, kept in enumerate(done.kept):
        if kept is None:
            continue
        for row, counts in enumerate(kept.tolist()):
            for head, count in enumerate(counts):
                yield layer, row, head, count, done.rules[layer][row, head]


# With nothing evicted.


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_with_nothing_evicted_the_ids_are_those_of_eager_attention(family, mode):
    done = run(family, mode, "full")
    assert torch.equal(done.out, reference(family, mode))
    assert done.seen == done.log.ids.shape[1] == expected_seen(mode)
    assert [layer for layer, kept in enumerate(done.kept) if kept is not None] == list(models.full_layers(family))
    for _, row, _, count, rule in heads(done):
        assert rule == "full"
        assert count == done.seen - pads(mode, len(done.log.ids))[row]
    CHECKS[mode](family, done)


def expected_seen(mode):
    """Columns the model was given: the last generated token is never fed back."""
    generated = {"several": 12, "two-turns": NEW + TURN + NEW}.get(mode, NEW)
    return PROMPT + generated - 1


# That each mode did what it is here for.


def one_by_one(family, done):
    assert done.log.passes == [(1, PROMPT)] + [(1, 1)] * (NEW - 1)
    # A model that repeats one token would hide errors.
    assert len(set(done.out[0, PROMPT:].tolist())) > 5


def sampled(family, done):
    assert not torch.equal(done.out, reference(family, "greedy"))


def reordered(family, done):
    beams = 3 if done.log.passes[0][0] == 3 else 2
    alone = reference(family, "greedy" if beams == 3 else "padded")
    assert not torch.equal(done.out, alone)
    # Rows of the cache were copied and dropped, not just renamed.
    assert any(order != list(range(len(order))) for order in done.log.orders)
    assert any(len(set(order)) < len(order) for order in done.log.orders)


def padded(family, done):
    assert done.log.passes[0] == (2, PROMPT)
    assert done.log.ids[0, :PADDING].tolist() == [2] * PADDING


def several(family, done):
    assert done.log.passes[0] == (3, PROMPT)
    assert len({tuple(row.tolist()) for row in done.out}) == 3


def looked_up(family, done):
    proposed = sum(columns for _, columns in done.log.passes) - PROMPT - (len(done.log.passes) - 1)
    assert len(done.log.removed) == len(done.log.passes)
    # Some proposals were taken back and some were taken.
    assert any(count > 1 for count in done.log.removed)
    assert 0 < sum(done.log.removed) < proposed


def chunked(family, done):
    assert [columns for _, columns in done.log.passes[:7]] == [7, 7, 7, 7, 7, 5, 1]


def continued(family, done):
    assert done.log.passes[NEW] == (1, TURN + 1)
    assert sum(columns for _, columns in done.log.passes) == done.seen


CHECKS = {
    "greedy": one_by_one,
    "sampling": sampled,
    "beams": reordered,
    "padded": padded,
    "padded-beams": reordered,
    "several": several,
    "lookup": looked_up,
    "chunked": chunked,
    "streaming": one_by_one,
    "two-turns": continued,
}


@pytest.mark.parametrize("policy", EVICTING)
def test_a_model_with_nothing_to_compress_is_refused_and_left_as_it_was(policy):
    model = models.shared(ALL_SLIDING)
    with pytest.raises(UnsupportedModelError, match="nothing to compress"):
        headwise.HeadwiseCache(model, policy_of(ALL_SLIDING, policy), tokenizer=TOKENIZER)
    assert model.config._attn_implementation == "eager"
    assert "forward" not in vars(model)


# With policies that evict.


@pytest.mark.parametrize(("family", "policy", "mode"), cases(*MODES))
def test_every_head_keeps_what_its_rule_says(family, policy, mode):
    done = run(family, mode, policy)
    assert done.seen == done.log.ids.shape[1] == expected_seen(mode)
    padding = pads(mode, len(done.log.ids))
    prompt = done.log.passes[0][1]
    if mode == "lookup":
        # What the look-up proposed along with the prompt and the model took counts as prompt.
        prompt -= done.log.removed[0]
    elif mode == "chunked":
        prompt = PROMPT
    checked = 0
    for layer, row, head, count, rule in heads(done):
        least, most = expected_kept(policy, rule, done.log.ids[row, padding[row] :], prompt - padding[row])
        assert least <= count <= most, (layer, row, head, rule)
        checked += 1
    assert checked == len(models.full_layers(family)) * done.log.ids.shape[0] * done.kept[-1].shape[1]
    if policy in FIXED_SIZES:
        assert all(count == FIXED_SIZES[policy] for *_, count, _ in heads(done))


def expected_kept(policy, rule, ids, prompt):
    """Fewest and most rows of a head with that rule, from the ids it has seen and nothing of headwise's."""
    seen = len(ids)
    if policy in FIXED_SIZES:
        return min(seen, FIXED_SIZES[policy]), min(seen, FIXED_SIZES[policy])
    if rule == "full":
        return seen, seen
    parts = rule.split("+")
    sure = torch.zeros(seen, dtype=torch.bool)
    if "special" in parts:
        sure |= torch.isin(ids, torch.tensor(tiny.SPECIAL_IDS))
    if "punctuation" in parts:
        sure |= torch.isin(ids, torch.tensor(list(tiny.PUNCTUATION)))
    if "local" in parts:
        sure[-max(1, round(0.3 * prompt)) :] = True
    sure = int(sure.sum())
    if "frequent" not in parts:
        return sure, sure
    heavy = math.ceil(0.3 * seen - 1e-9)
    return max(sure, heavy), min(seen, sure + heavy)


def test_the_matrix_meets_every_kind_of_rule():
    """Otherwise the counts above would say little."""
    rules = {rule for family in COMPRESSIBLE for *_, rule in heads(run(family, "padded", "fastgen-exact"))}
    assert rules == set(EXACT_LADDER)


def assert_same(one, other):
    assert torch.equal(one.out, other.out)
    assert one.seen == other.seen
    for mine, its in zip(one.kept, other.kept, strict=True):
        assert (mine is None) == (its is None)
        assert mine is None or torch.equal(mine, its)
    for mine, its in zip(one.rules, other.rules, strict=True):
        assert mine is None or mine.tolist() == its.tolist()


@pytest.mark.parametrize(("family", "policy", "mode"), cases("chunked", "streaming"))
def test_chunks_and_streaming_change_nothing(family, policy, mode):
    # Look-up is not here: drafted tokens attend to what greedy decoding has evicted by then, so its ids may differ.
    assert_same(run(family, mode, policy), run(family, "greedy", policy))


@pytest.mark.parametrize(("family", "policy", "mode"), cases("padded"))
def test_a_row_of_a_batch_is_what_the_prompt_gives_alone(family, policy, mode):
    batch = run(family, mode, policy)
    ids, _ = models.padded_pair()
    for row, padding in enumerate((PADDING, 0)):
        alone = generate_alone(family, policy, ids[row : row + 1, padding:])
        assert torch.equal(batch.out[row : row + 1, padding:], alone.out)
        for mine, its in zip(batch.kept, alone.kept, strict=True):
            assert (mine is None) == (its is None)
            assert mine is None or torch.equal(mine[row : row + 1], its)
        for mine, its in zip(batch.rules, alone.rules, strict=True):
            assert mine is None or mine[row].tolist() == its[0].tolist()


def generate_alone(family, policy, ids):
    return run_once(family, lambda model, cache: models.generate(model, ids, cache), policy)


@pytest.mark.parametrize("policy", EVICTING)
def test_chunks_without_the_length_of_the_prompt_are_warned_about(policy):
    model = models.shared("llama")
    cache = headwise.HeadwiseCache(model, policy_of("llama", policy), tokenizer=TOKENIZER)
    with pytest.warns(HeadwiseWarning, match=r"prompt_tokens=input_ids\.shape\[1\]") as caught:
        MODES["chunked"](model, cache)
    assert len([warning for warning in caught if warning.category is HeadwiseWarning]) == 1
