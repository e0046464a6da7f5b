"""Policies that choose again: what they keep, against loops over tokens; and that nothing else changes it."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import pytest
import torch

import headwise
import rechoosing_oracle
import tiny
from captured_steps import traced
from gated import gates_for
from headwise.errors import CacheStateError, ConfigurationError
from headwise.gate.checkpoint import save_gates
from headwise.hosts.transformers.graph import DecodeGraph
from headwise.less.state import EvictedState
from less_caches import remembering
from models import unchecked_shapes
from oracle import rows_of
from rechoosing_oracle import Recording, count_of, heads_of
from scored_prompts import model, words

EVERY, PROMPT = 5, 41

ONE_LAYER = [
    headwise.SnapKV(0.3, window=5, kernel=3, choose_every=EVERY),
    headwise.SnapKV(13, window=8, kernel=1, choose_every=EVERY),
    headwise.TOVA(0.3, choose_every=EVERY),
    headwise.RKV(0.3, window=4, kernel=3, alike=0.4, choose_every=EVERY),
    headwise.RKV(14, window=2, kernel=1, weight=0.5, alike=0.2, spared=3, choose_every=EVERY),
    headwise.KeyNorm(0.21, choose_every=EVERY),
    headwise.KeyDiff(11, choose_every=EVERY),
    headwise.Scissorhands(0.3, history=10, recent=3, choose_every=EVERY),
    headwise.AdaKV(0.3, over=headwise.SnapKV(0.3, window=4, kernel=3), choose_every=EVERY),
    headwise.AdaKV(0.3, over=headwise.TOVA(0.3), safeguard=0.5, choose_every=EVERY),
]
# Passes behind the prompt: steps, a turn, drafts.
PASSES = [1] * 16 + [19, 1, 1, 4, 1, 30, 1, 1, 2] + [1] * 20 + [9, 1]


def follow(cache, ids, passes, after=lambda seen: None):
    """Read the prompt and then so many tokens at a time."""
    with torch.no_grad():
        for end in torch.tensor([PROMPT, *passes]).cumsum(0).tolist():
            part = slice(cache.get_seq_length(), end)
            model()(input_ids=ids[:, part], past_key_values=cache, position_ids=torch.arange(end)[None, part])
            after(end)
    return cache


def new(policy, **options):
    return headwise.HeadwiseCache(model(), policy, tokenizer=tiny.tokenizer(), **options)


def held(cache):
    """Columns of every head of every layer, of one sequence."""
    return [rows_of(layer.core)[0] for layer in cache.headwise_layers]


@pytest.mark.parametrize("policy", ONE_LAYER, ids=str)
def test_what_stays_is_what_the_formulas_name(policy):
    cache, expected, since, read, choices = new(policy), [], PROMPT, PROMPT, []

    def compare(seen):
        nonlocal expected, since, read
        if seen == PROMPT:
            expected = held(cache)
            return
        expected = [[head | set(range(read, seen)) for head in layer] for layer in expected]
        read = seen
        if seen - since >= EVERY:
            since = seen
            for layer, heads in enumerate(expected):
                expected[layer] = rechoosing_oracle.choose(policy, heads_of(record, layer, heads, seen))
            choices.append(seen)
        assert held(cache) == expected, seen

    with Recording() as record:
        follow(cache, words(98, seed=5), PASSES[:20], compare)
    assert choices == [46, 51, 56, 76, 82]


@pytest.mark.parametrize("gate", [False, True], ids=["found", "predicted"])
@pytest.mark.parametrize("kind", [headwise.KVzip, headwise.PeakAttention])
def test_rows_remember_what_they_were_worth(kind, gate, tmp_path):
    """Over all layers; new rows begin with nothing, or with what a gate predicts, and queries far away raise it."""
    gates = gates_for(model())
    save_gates(gates, tmp_path / "gates")
    policy = kind(keep=0.3, choose_every=EVERY, gate=str(tmp_path / "gates") if gate else False)
    cache, expected, peaks, since, read = new(policy), [], [], PROMPT, PROMPT

    def compare(seen):
        nonlocal expected, peaks, since, read
        if seen == PROMPT:
            expected = held(cache)
            stored = [layer.core.store for layer in cache.headwise_layers]
            peaks = [
                [dict(zip(c.tolist(), s.tolist(), strict=True)) for c, s in zip(*each, strict=True)]
                for each in ((rows.columns[0], rows.scores[0]) for rows in (store.rows() for store in stored))
            ]
            return
        expected = [[head | set(range(read, seen)) for head in layer] for layer in expected]
        read = seen
        if seen - since < EVERY:
            return
        worth = {}
        for layer, each in enumerate(expected):
            heads = heads_of(record, layer, each, seen)
            if gate:
                _, keys, _ = record.of(layer)
                at, length = torch.arange(since, seen)[None], torch.full((1, 1, 1), seen)
                rotation = cache.headwise_layers[layer].core.config.rotation
                scores = gates.layers[layer].scores(keys[None, :, since:seen].float(), at, length, rotation)[0]
                for h, own in enumerate(peaks[layer]):
                    own |= dict(zip(range(since, seen), scores[h].tolist(), strict=True))
            for h, head in enumerate(heads):
                peaks[layer][h] = rechoosing_oracle.raised(peaks[layer][h], head, EVERY, 64)
                best = dict(peaks[layer][h])
                if kind is headwise.PeakAttention:
                    best = rechoosing_oracle.newest(best, head, policy.window)
                worth |= {(layer, h, c): 9999.0 if c < policy.sinks else s for c, s in best.items()}
        since = seen
        kept = sorted(worth, key=lambda at: -worth[at])[: count_of(0.3, seen) * len(expected) * len(expected[0])]
        expected = [[{c for i, j, c in kept if (i, j) == (at, h)} for h in (0, 1)] for at in range(len(expected))]
        assert held(cache) == expected, seen

    with Recording() as record:
        follow(cache, words(98, seed=6), [1, 29, 9, 8, 10], compare)
    assert held(cache) == expected


@pytest.mark.parametrize(
    "policy",
    [
        *(replace(policy, choose_every=9) for policy in ONE_LAYER[:4]),
        headwise.PyramidKV(0.4, window=3, kernel=3, choose_every=9),
        headwise.ExpectedAttention(0.3, choose_every=9),
        headwise.KVzip(0.3, choose_every=9),
        headwise.PeakAttention(keep=14, window=5, choose_every=9),
        headwise.Quantized(headwise.SnapKV(0.3, window=5, choose_every=9), recent=4),
    ],
    ids=str,
)
def test_a_size_holds_through_turns_and_steps(policy):
    size = policy.chooser.keep

    def compare(seen):
        rows = torch.tensor([[len(head) for head in layer] for layer in held(cache)]).double()
        least = count_of(size, seen)
        # The sizes of layers differ by design, and those of heads by need; on the whole they are as asked.
        assert rows.mean() < least + 9, seen
        if seen - PROMPT >= 9 and cache.headwise_layers[0].core.evicted_at == seen:
            assert abs(rows.mean() - least) < 1, seen
            chosen.append(seen)

    cache, chosen = new(policy), []
    follow(cache, tiny.prompt(160, seed=8), PASSES, compare)
    assert len(chosen) >= 5


@pytest.mark.parametrize("size", [{"ratio": 0.4}, {"bytes": 20_000}], ids=str)
def test_bytes_hold_through_turns_and_steps(size):
    policy = headwise.Auto(**size, window=5, choose_every=9)
    cache, chosen = new(policy), []

    def compare(seen):
        asked = policy.bytes or policy.ratio * cache.report().full_bytes
        row = 2 * 14 * 4 + 8
        assert cache.report().used_bytes <= asked + 9 * 6 * row, seen
        if cache.headwise_layers[0].core.evicted_at == seen:
            assert 0.85 * asked <= cache.report().used_bytes <= asked, seen
            chosen.append(seen)

    follow(cache, tiny.prompt(160, seed=8), PASSES, compare)
    assert len(chosen) >= 5


def test_enough_attention_is_enough_later_too():
    cache = follow(
        new(headwise.PeakAttention(recovery=0.9, window=4, choose_every=9)), tiny.prompt(160, seed=8), PASSES
    )
    less = follow(new(headwise.PeakAttention(recovery=0.5, window=4, choose_every=9)), tiny.prompt(160, seed=8), PASSES)
    assert less.report().kept_ratio < 0.7 * cache.report().kept_ratio < 0.7


ALIKE = [
    headwise.SnapKV(0.3, window=5, kernel=3, choose_every=EVERY),
    headwise.TOVA(0.3, choose_every=EVERY),
    headwise.AdaKV(0.3, over=headwise.TOVA(0.3), choose_every=EVERY),
    headwise.ExpectedAttention(0.3, choose_every=EVERY),
    headwise.KVzip(0.3, choose_every=EVERY),
    headwise.Auto(ratio=0.4, window=5, choose_every=EVERY),
    headwise.Auto(recovery=0.95, window=5, choose_every=EVERY),
    headwise.Quantized(headwise.SnapKV(0.3, window=5, choose_every=EVERY), recent=4),
]


@pytest.mark.parametrize("policy", ALIKE, ids=str)
def test_a_sequence_keeps_the_same_alone_and_in_a_padded_batch(policy):
    first, second = words(60, seed=1)[0], words(51, seed=2)[0]
    alone = [new(policy) for _ in range(2)]
    together = new(policy)
    ids, mask = tiny.left_padded(first[:PROMPT], second[: PROMPT - 9])
    ids = torch.cat([ids, torch.stack([first[PROMPT:], second[PROMPT - 9 :]])], dim=1)
    mask = torch.cat([mask, torch.ones(2, 19, dtype=torch.long)], dim=1)
    at = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        for part in torch.arange(60).split([PROMPT, 1, 1, 1, 1, 1, 1, 1, 8, 1, 1, 1, 1]):
            shown = mask[:, : part[-1] + 1]
            model()(input_ids=ids[:, part], attention_mask=shown, position_ids=at[:, part], past_key_values=together)
            for row, cache in enumerate(alone):
                mine = part[mask[row, part] == 1]
                model()(input_ids=ids[row : row + 1, mine], position_ids=at[row : row + 1, mine], past_key_values=cache)
    for layers in zip(together.headwise_layers, *(cache.headwise_layers for cache in alone), strict=True):
        both, one, other = (rows_of(layer.core) for layer in layers)
        assert both[0] == one[0]
        assert both[1] == [{column + 9 for column in head} for head in other[0]]


@pytest.mark.parametrize("policy", ALIKE, ids=str)
def test_saved_copied_and_repeated_caches_choose_alike(policy, tmp_path):
    ids = words(80, seed=3)
    cache = follow(new(policy), ids, [1, 1, 1, 8, 1])
    cache.save(tmp_path / "cache")
    others = [
        copy.deepcopy(cache),
        headwise.HeadwiseCache.load(tmp_path / "cache", model(), policy, tokenizer=tiny.tokenizer()),
    ]
    double = copy.deepcopy(cache)
    double.batch_repeat_interleave(2)
    double.reorder_cache(torch.tensor([1, 0]))
    for end in range(cache.get_seq_length(), 80):
        with torch.no_grad():
            expected = model()(input_ids=ids[:, end : end + 1], past_key_values=cache).logits
            for other in others:
                assert torch.equal(model()(input_ids=ids[:, end : end + 1], past_key_values=other).logits, expected)
            twice = model()(input_ids=ids[:, end : end + 1].expand(2, 1), past_key_values=double).logits
            torch.testing.assert_close(twice, expected.expand(2, -1, -1), atol=1e-5, rtol=1e-5)
    assert held(others[0]) == held(others[1]) == held(double) == held(cache)
    assert max(len(head) for layer in held(cache) for head in layer) < 60


# While a step is captured, no row becomes codes.
@pytest.mark.parametrize("policy", ALIKE[:5], ids=str)
def test_a_captured_step_chooses_as_a_plain_one(policy):
    ids = words(80, seed=4)
    plain, graphed = (follow(new(policy, kernel="reference"), ids, [1, 1]) for _ in range(2))
    with DecodeGraph(model(), graphed, room=11, capture=traced) as graph, torch.no_grad():
        for end in range(PROMPT + 2, 80):
            expected = model()(input_ids=ids[:, end : end + 1], past_key_values=plain).logits[:, -1]
            torch.testing.assert_close(graph.step(ids[:, end : end + 1]), expected, atol=1e-5, rtol=1e-5)
            assert held(graphed) == held(plain), end


@pytest.mark.parametrize("policy", ALIKE[:5], ids=str)
def test_tokens_can_be_taken_back_to_the_last_choice_and_no_further(policy):
    ids = words(80, seed=3)
    cache = follow(new(policy), ids, [1, 8, 1, 1, 1])
    kept = held(cache)
    cache.crop(-3)
    assert held(cache) == [[head - {50, 51, 52} for head in layer] for layer in kept]
    with pytest.raises(CacheStateError, match="cannot remove 1 tokens"):
        cache.crop(-1)
    # What was taken back asks nothing any more.
    follow_on = copy.deepcopy(cache)
    other = words(80, seed=9)
    for each, tokens in ((cache, other), (follow_on, other)):
        with torch.no_grad():
            for end in range(50, 64):
                model()(input_ids=tokens[:, end : end + 1], past_key_values=each)
    assert held(cache) == held(follow_on)


def test_what_a_later_choice_drops_is_folded_in():
    policy = headwise.SnapKV(9, window=4, choose_every=EVERY)
    cache, dropped = remembering(model(), policy), 0
    with Recording() as record:
        follow(cache, words(98, seed=5), PASSES[:20])
    for index, layer in enumerate(cache.headwise_layers):
        _, keys, values = (part.float()[None] for part in record.of(index))
        gone = torch.ones(1, *keys.shape[1:3], dtype=torch.bool)
        for h, head in enumerate(held(cache)[index]):
            gone[0, h, sorted(head)] = False
        expected = EvictedState(layer.core.evicted.features)
        expected.fold(keys, values, gone)
        torch.testing.assert_close(layer.core.evicted.state(), expected.state(), atol=1e-3, rtol=1e-4)
        dropped += int(gone.sum())
    assert dropped > 6 * 50


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (headwise.SnapKV(0.25, window=5), "25.0% of all tokens seen, chosen again every 32 tokens"),
        (headwise.KVzip(12, choose_every=7), "12 tokens of each head, chosen again every 7 tokens"),
        (headwise.TOVA(0.5, of="prompt"), "50.0% of the prompt, chosen once"),
        (headwise.Match(headwise.SnapKV(0.5, window=5)), "50.0% of the prompt, chosen once"),
        (headwise.PeakAttention(0.9), "all that a query pays 0.1 of its attention, chosen again every 32 tokens"),
        (headwise.Auto(ratio=0.3), "30.0% of the bytes of all tokens seen, chosen again every 32 tokens"),
        (headwise.Auto(bytes=2**14), "16.0 KiB for each sequence, chosen again every 32 tokens"),
        (headwise.Random(0.5), "50.0% of all tokens seen"),
        (headwise.Full(), None),
    ],
    ids=str,
)
def test_a_report_says_what_was_asked_for(policy, words):
    report = follow(new(policy), tiny.prompt(60), [1]).report()
    assert report.to_dict()["asked"] == words
    assert (re.search(f"asked for +{words}\n", str(report)) is not None) is (words is not None)


def test_words_for_it():
    policy = headwise.SnapKV(0.3, of="prompt", choose_every=5)
    assert str(policy) == "SnapKV(keep=0.3, of='prompt', choose_every=5)"
    assert str(headwise.AdaKV(0.3, over=headwise.TOVA(4))) == "AdaKV(keep=0.3, over=TOVA(keep=4))"
    assert next(iter(policy.parameters())) == "keep"
    with unchecked_shapes(), pytest.raises(ConfigurationError, match="of must be one of seen, prompt, got 'all'"):
        headwise.KVzip(0.5, of="all")
    for wrong in (0, -3, 2.5, True):
        with unchecked_shapes(), pytest.raises(ConfigurationError, match="choose_every must be a count of 1 or more"):
            headwise.Auto(ratio=0.5, choose_every=wrong)
