"""Steering on a compressed cache: what is marked stays under every policy; the rest is chosen by the steered map."""

from __future__ import annotations

import math

import pytest
import torch

import headwise
import rechoosing_oracle
import tiny
from captured_steps import traced
from oracle import rows_of, scores_of, use_oracle
from passes import play
from rechoosing_oracle import Recording, heads_of
from scored_prompts import model

HEADS = {0: [0, 3, 4], 2: [1, 5]}
SPANS = (((15, 17), (30, 33)), ((2, 8),), ())
STEPS = (1, 1, 1, 1, 5, 1, 2, 1, 1, 1, 1)

RULES = [
    headwise.Full(),
    headwise.Window(7),
    headwise.StreamingLLM(window=9, sinks=3),
    headwise.H2O(heavy=5, recent=4),
    headwise.H2O(heavy=0.2, recent=0.1),
    headwise.Random(keep=0.5, seed=3),
    headwise.FastGen(0.75),
    headwise.FastGen(0.7, rows="last", last_rows=5),
    headwise.FastGen(0.6, fold="mean", criterion="l1", sinks=2),
]


def new(policy, llama, steering=None, spans=SPANS, columns=37, **options):
    cache = headwise.HeadwiseCache(
        llama, policy, tokenizer=tiny.tokenizer(), steering=steering or headwise.Steering(HEADS, 0.1), **options
    )
    cache.mark(headwise.Marked(spans, columns))
    return cache


@pytest.mark.parametrize("evict_every", [1, 3])
@pytest.mark.parametrize("policy", RULES, ids=str)
def test_rules_agree_with_the_masked_oracle(policy, evict_every):
    """Logits, kept tokens, recovered mass and scores; in a padded batch of which one sequence has no mark."""
    ids, mask = tiny.left_padded(tiny.prompt(23, seed=1)[0], tiny.prompt(37, seed=2)[0], tiny.prompt(9, seed=3)[0])
    llama, continuation = tiny.llama(), tiny.prompt(sum(STEPS), seed=9, batch=3)
    oracle = use_oracle(new(policy, llama, evict_every=evict_every))
    expected = play(llama, oracle, ids, mask, continuation, STEPS)
    for kernel in ("cpu", "reference"):
        cache = new(policy, llama, evict_every=evict_every, page_size=4, kernel=kernel)
        found = play(llama, cache, ids, mask, continuation, STEPS)
        for ours, its in zip(cache.headwise_layers, oracle.headwise_layers, strict=True):
            assert torch.equal(ours.core.plan.choice, its.core.choice)
            assert rows_of(ours.core) == rows_of(its.core)
            assert all({15, 16, 30, 31, 32} <= head for head in rows_of(ours.core)[0])
            if ours.core.plan.scored:
                mine, theirs = scores_of(ours.core, its.core)
                torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found[0][mask.bool()], expected[0][mask.bool()], atol=2e-4, rtol=1e-4)
        for mine, theirs in zip(found[1:], expected[1:], strict=True):
            torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=1e-4)


SCORED = [
    headwise.SnapKV(0.3, window=5, kernel=3, choose_every=5),
    headwise.TOVA(0.3, choose_every=5),
    headwise.KeyDiff(11, choose_every=5),
    headwise.ExpectedAttention(0.4, future=20, choose_every=5),
    headwise.RKV(0.3, window=4, kernel=3, choose_every=5),
    headwise.LazyEviction(0.4, window=5, choose_every=5),
    headwise.AdaKV(0.3, over=headwise.SnapKV(0.3, window=4, kernel=3), choose_every=5),
    headwise.KVzip(0.3, window=4, choose_every=5),
    headwise.PeakAttention(keep=0.4, window=5, choose_every=5),
    headwise.PeakAttention(0.7, window=3),
    headwise.Quantized(headwise.SnapKV(0.3, window=5, choose_every=5), recent=4),
    headwise.Auto(ratio=0.3, window=4, recent=4, choose_every=5),
    headwise.Match(headwise.SnapKV(0.3, window=5, kernel=3, choose_every=5)),
]


@pytest.mark.shapes
@pytest.mark.parametrize("policy", SCORED, ids=str)
def test_what_is_marked_stays_at_every_choice(policy):
    ids, spans = tiny.prompt(90, seed=5), (((10, 14), (21, 22)),)
    cache, marked = new(policy, model(), spans=spans, columns=41), {10, 11, 12, 13, 21}
    with torch.no_grad():
        for end in [41, *range(42, 60), 75, *range(76, 90)]:
            model()(input_ids=ids[:, cache.get_seq_length() : end], past_key_values=cache)
            assert all(marked <= head for layer in cache.headwise_layers for head in rows_of(layer.core)[0])
    quota = 0.41 * 89 * 6 + 32 * 6
    assert sum(len(head) for layer in cache.headwise_layers for head in rows_of(layer.core)[0]) < quota or (
        not cache.policy.chooser.again
    )


def test_what_is_marked_is_part_of_the_size():
    ids = tiny.prompt(41, seed=5)
    cache = new(headwise.KeyNorm(12), model(), spans=(((10, 14),),), columns=41)
    with torch.no_grad():
        model()(input_ids=ids, past_key_values=cache)
    assert all(kept.tolist() == [[12, 12]] for kept in cache.report().kept_tokens)


@pytest.mark.parametrize("profile", ["steered", "plain"])
def test_scores_are_of_the_map_that_was_asked_for(profile):
    """SnapKV at the end of the prompt and at a later choice, layer by layer, against loops over what it was given."""
    policy = headwise.SnapKV(0.4, window=5, kernel=1, choose_every=5)
    ids, spans = tiny.prompt(60, seed=5), (((10, 12),),)
    steering = headwise.Steering.every_head(alpha=0.01, profile=profile)
    cache, held, differ = new(policy, model(), steering, spans=spans, columns=41), [], False
    with torch.no_grad(), Recording() as record:
        for end in (41, 42, 47):
            model()(input_ids=ids[:, cache.get_seq_length() : end], past_key_values=cache)
            if end == 42:
                continue
            for layer, each in enumerate(cache.headwise_layers):
                own = rows_of(each.core)[0]
                rows = [head | set(range(41, end)) for head in held[layer]] if held else [set(range(end))] * 2
                heads = heads_of(record, layer, rows, end)
                found = [chosen(policy, head, way) for head in heads for way in (True, False)]
                steered, plain = found[::2], found[1::2]
                assert own == (steered if profile == "steered" else plain)
                differ |= steered != plain
            held = [rows_of(each.core)[0] for each in cache.headwise_layers]
    assert differ


def chosen(policy, head, steered):
    """What SnapKV keeps of one head, by the map that is steered or not."""

    def attention(group, column):
        seen = [c for c in head.held if c <= column]
        logits = head.keys[seen] @ head.query[group, column] * head.scaling
        scaled = torch.tensor([math.log(0.01) if c < 41 and c not in (10, 11) else 0.0 for c in seen])
        weights = (logits + scaled * steered).softmax(0).tolist()
        return dict(zip(seen, weights, strict=True))

    head.attention = attention
    (scores,) = rechoosing_oracle.snapkv(policy, [head])
    return rechoosing_oracle.best(scores | {10: math.inf, 11: math.inf}, math.ceil(policy.keep * head.seen))


@pytest.mark.parametrize("steering", [headwise.Steering(HEADS, 0.05), headwise.TargetShare(HEADS, 0.4)], ids=str)
def test_a_captured_step_is_steered_as_a_plain_one(steering):
    policy, ids = headwise.SnapKV(0.4, window=5, choose_every=5), tiny.prompt(70, seed=5)
    caches = [new(policy, model(), steering, (((10, 14),),), 41, kernel="reference") for _ in range(2)]
    with torch.no_grad():
        for each in caches:
            for end in (41, 42):
                model()(input_ids=ids[:, each.get_seq_length() : end], past_key_values=each)
        plain, graphed = caches
        with headwise.DecodeGraph(model(), graphed, room=9, capture=traced) as graph:
            for end in range(42, 70):
                expected = model()(input_ids=ids[:, end : end + 1], past_key_values=plain).logits[:, -1]
                torch.testing.assert_close(graph.step(ids[:, end : end + 1]), expected, atol=1e-5, rtol=1e-5)
                mine, its = ([rows_of(each.core) for each in one.headwise_layers] for one in (graphed, plain))
                assert mine == its


@pytest.mark.parametrize("size", [{"ratio": 0.4}, {"bytes": 40_000}], ids=str)
def test_bytes_hold_with_marks(size):
    policy = headwise.Auto(**size, window=5, choose_every=9)
    cache, ids = new(policy, model(), spans=(((10, 14),),), columns=41), tiny.prompt(90, seed=5)
    plain = headwise.HeadwiseCache(model(), policy, tokenizer=tiny.tokenizer())
    with torch.no_grad():
        for end in [41, *range(42, 90)]:
            for each in (cache, plain):
                model()(input_ids=ids[:, each.get_seq_length() : end], past_key_values=each)
    used, without = (each.report().used_bytes for each in (cache, plain))
    assert used <= 1.02 * without


def test_a_policy_that_repeats_a_further_prompt_looks_at_the_steered_map():
    """What its rows carry, against loops over what the layers were given while it was repeated."""
    ids, steering = tiny.prompt(90, seed=5), headwise.Steering({0: [0, 1, 2], 1: [3, 4, 5]}, alpha=0.02)
    cache = new(headwise.KVzip(keep=0.9, choose_every=5, of="seen"), model(), steering, (((10, 14),),), 41)
    with torch.no_grad(), Recording() as record:
        model()(input_ids=ids[:, :41], past_key_values=cache)
        model()(input_ids=ids[:, 41:42], past_key_values=cache)
        cache.mark(headwise.Marked((((10, 14), (50, 55)),), 60))
        held = [[head | set(range(42, 60)) for head in rows_of(each.core)[0]] for each in cache.headwise_layers]
        model()(input_ids=ids[:, 42:60], past_key_values=cache)
    marked = {*range(10, 14), *range(50, 55), 41}
    for layer, each in enumerate(cache.headwise_layers):
        rows, (query, keys, _) = each.core.store.rows(), record.repeated[layer]
        for h, head in enumerate(heads_of(record, layer, held[layer], 60)):
            steered = 3 * h in steering.heads.get(layer, ())
            added = {c: steered * (c not in marked) * math.log(0.02) for c in range(60)}
            found = rechoosing_oracle.repeated({}, head, query[h], keys[h], range(42, 60), added.get)
            # Queries of the turn itself may have raised it since, from 16 tokens away.
            for column, score in zip(rows.columns[0, h].tolist(), rows.scores[0, h].tolist(), strict=True):
                if 44 < column < 60 and rows.keep[0, h, rows.columns[0, h].tolist().index(column)]:
                    assert score == pytest.approx(found[column], abs=1e-5)


def test_rows_are_refitted_to_what_is_steered():
    """With half of the rows, Match brings the steered outputs nearer to those of all rows."""
    ids, spans = tiny.prompt(97, seed=3), (((10, 14),),)
    steering, found = headwise.Steering.every_head(alpha=0.05), []
    for policy in (headwise.Full(), headwise.SnapKV(20, window=4), headwise.Match(headwise.SnapKV(20, window=4))):
        cache = new(policy, model(), steering, spans=spans, columns=80)
        with torch.no_grad():
            model()(input_ids=ids[:, :80], past_key_values=cache)
            logits = [model()(input_ids=ids[:, i : i + 1], past_key_values=cache).logits for i in range(80, 97)]
        found.append(torch.cat(logits, dim=1).log_softmax(-1))
    full, bare, mended = found
    matched = [errors for errors in cache.report().matched if errors is not None]
    assert all((after <= before).all() for before, after in matched)

    def divergence(other):
        return float((full.exp() * (full - other)).sum(-1).mean())

    assert divergence(mended) < divergence(bare)


def test_what_does_not_go_together_is_refused():
    llama, steering = tiny.llama(), headwise.Steering(HEADS)
    for wrong, said in (
        ({"steering": headwise.Steering({7: [0]})}, "heads of layer 7 are to be steered"),
        ({"steering": headwise.Steering({0: [6]})}, "head 6 of layer 0 is to be steered, and a layer of .* 0 to 5"),
    ):
        with pytest.raises(headwise.ConfigurationError, match=said):
            headwise.HeadwiseCache(llama, headwise.Full(), **wrong)
    matched = headwise.Match(headwise.SnapKV(0.5))
    with pytest.raises(headwise.ConfigurationError, match="TargetShare depends on each query"):
        headwise.HeadwiseCache(llama, matched, steering=headwise.TargetShare.every_head())
    with pytest.raises(headwise.ConfigurationError, match="make the cache with steering"):
        headwise.HeadwiseCache(llama, headwise.Full()).mark(headwise.Marked((((0, 1),),), 3))
    cache = headwise.HeadwiseCache(llama, headwise.Full(), steering=steering)
    cache.mark(headwise.Marked((((0, 1),), ((0, 1),)), 9))
    with pytest.raises(headwise.InputError, match="spans of 2 sequences were marked, and this pass brings 1"):
        llama(input_ids=tiny.prompt(9), past_key_values=cache)
    cache = headwise.HeadwiseCache(llama, headwise.Full(), steering=steering)
    cache.mark(headwise.Marked((((1, 4),),), 9))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1]])
    with pytest.raises(headwise.InputError, match="padding is marked"), torch.no_grad():
        llama(input_ids=tiny.prompt(9), attention_mask=mask, past_key_values=cache)
    # Nothing of it stays: with other marks the cache is as good as new.
    fresh = headwise.HeadwiseCache(llama, headwise.Full(), steering=steering)
    found = []
    for each in (cache, fresh):
        each.mark(headwise.Marked((((2, 4),),), 9))
        with torch.no_grad():
            llama(input_ids=tiny.prompt(9), attention_mask=mask, past_key_values=each)
            step = {"input_ids": tiny.prompt(10)[:, 9:], "attention_mask": torch.cat([mask, mask[:, -1:]], dim=1)}
            found.append(llama(**step, past_key_values=each).logits)
    assert torch.equal(*found)
    cache = headwise.HeadwiseCache(llama, headwise.Full(), steering=steering)
    with torch.no_grad():
        llama(input_ids=tiny.prompt(9), past_key_values=cache)
    with pytest.raises(headwise.InputError, match="token 3 is marked, and 9 tokens were read before"):
        cache.mark(headwise.Marked((((3, 5),),), 12))
    with pytest.raises(headwise.InputError, match="the ids end at 9"):
        cache.mark(headwise.Marked(((),), 9))
