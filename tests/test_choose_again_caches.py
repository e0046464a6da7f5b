"""Caches of policies that choose again: batches, copies, captured steps, taking back, LESS, and what reports say."""

from __future__ import annotations

import copy
import re

import pytest
import torch

import headwise
import tiny
from captured_steps import traced
from headwise.errors import CacheStateError, ConfigurationError
from headwise.hosts.transformers.graph import DecodeGraph
from headwise.less.state import EvictedState
from headwise.stages.newest import NewestQueries
from headwise.store.store import RowStore
from headwise.types import LogitOptions
from less_caches import remembering
from models import unchecked_shapes
from oracle import rows_of
from rechoosing import EVERY, PASSES, PROMPT, follow, held, new
from rechoosing_oracle import Recording
from scored_prompts import model, words

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
    alignments = {each.headwise_layers[0].core.later.newest.before for each in (cache, *others)}
    assert alignments == ({3} if cache.policy.chooser.again.stride == 4 else {0})
    double = copy.deepcopy(cache)
    double.batch_repeat_interleave(2)
    double.reorder_cache(torch.tensor([1, 0]))
    for end in range(cache.get_seq_length(), 80):
        with torch.no_grad():
            expected = model()(input_ids=ids[:, end : end + 1], past_key_values=cache).logits
            for other in others:
                assert torch.equal(model()(input_ids=ids[:, end : end + 1], past_key_values=other).logits, expected)
            twice = model()(input_ids=ids[:, end : end + 1].expand(2, 1), past_key_values=double).logits
            # A code may fall to the other side of where it is rounded.
            torch.testing.assert_close(twice, expected.expand(2, -1, -1), atol=1e-4, rtol=1e-4)
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


def test_no_row_loses_bits_while_a_step_is_captured(monkeypatch):
    """What was captured reads rows where they were; so it is as if none became codes."""
    policy, ids = headwise.Auto(ratio=0.4, window=5, recent=4, choose_every=EVERY), words(80, seed=4)
    plain, graphed = (follow(new(policy, kernel="reference"), ids, [1, 1]) for _ in range(2))
    with DecodeGraph(model(), graphed, room=40, capture=traced) as graph, torch.no_grad():
        for end in range(PROMPT + 2, 80):
            with monkeypatch.context() as patched:
                patched.setattr(
                    RowStore, "recode", lambda store, keep, formats, columns, spare: store.drop(keep, spare)
                )
                patched.setattr(RowStore, "encode_old", lambda store: None)
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
        (headwise.SnapKV(0.25, window=5), "25.0% of all tokens seen, chosen again every 32 tokens or more"),
        (headwise.KVzip(12, choose_every=7), "12 tokens of each head, chosen again every 7 tokens or more"),
        (headwise.TOVA(0.5, of="prompt"), "50.0% of the prompt, chosen once"),
        (
            headwise.Match(headwise.SnapKV(0.5, window=5)),
            "50.0% of all tokens seen, chosen again every 32 tokens or more",
        ),
        (headwise.PeakAttention(0.9), "all that a query pays 0.1 of its attention, chosen again every 32 tokens"),
        (headwise.Auto(ratio=0.3), "30.0% of the bytes of all tokens seen, chosen again every 56 tokens or more"),
        (headwise.Auto(bytes=2**14), "16.0 KiB for each sequence, chosen again every 56 tokens"),
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


def test_a_query_that_was_overwritten_by_one_that_was_taken_back_is_not_there():
    ring, options = NewestQueries(4), LogitOptions(1.0)
    queries = torch.arange(10.0).view(1, 1, 1, 10, 1)
    for columns in torch.arange(10).split([3, 1, 1, 5]):
        ring.put(queries[:, :, :, columns], columns, options)
    found, columns, there = ring.of(10)
    assert (found.flatten().tolist(), columns.tolist(), there.tolist()) == ([6, 7, 8, 9], [6, 7, 8, 9], [True] * 4)
    # Two were taken back, which lie where those of columns 4 and 5 were.
    found, columns, there = ring.of(8)
    assert (columns.tolist(), there.tolist()) == ([0, 0, 6, 7], [False, False, True, True])
    assert found.flatten().tolist()[2:] == [6, 7]
    ring.put(queries[:, :, :, 3:4] + 100, torch.tensor([8]), options)
    found, _, there = ring.of(9)
    assert (found.flatten().tolist()[1:], there.tolist()) == ([6, 7, 103], [False, True, True, True])


@pytest.mark.parametrize(("size", "stride"), [(3, 2), (4, 4), (2, 5), (40, 3)])
def test_of_queries_that_follow_one_another_one_is_held(size, stride):
    """The newest of each stride, however they come, and none from before a column."""
    ring, options, lies = NewestQueries(size, stride), LogitOptions(1.0), {}
    ring.begin_behind(11)
    queries = torch.arange(70.0).view(1, 1, 1, 70, 1)
    for columns in torch.arange(70).split([11, 1, 1, 1, 7, 2, 1, 30, 1, 1, 1, 13]):
        ring.put(queries[:, :, :, columns], columns, options)
        first, seen = columns[0].item(), columns[-1].item() + 1
        lies |= {(column - 11) // stride: column for column in range(seen - 1, first - 1, -stride)}
        for since in (0, seen - 1, max(0, seen - 9)):
            found, at, there = ring.of(seen, since)
            newest = [lies[each] for each in sorted(lies)[-size:]]
            expected = [column for column in newest if column >= since]
            assert at[there].tolist() == found.flatten()[there].tolist() == expected
