"""Eviction against the masked oracle: same logits, same kept tokens, for every policy, padding and GQA included."""

from __future__ import annotations

import pytest
import torch

import headwise
import tiny
from headwise.policies.frequent import Frequent
from headwise.policies.punctuation import Punctuation
from headwise.policies.sinks import Sinks
from headwise.policies.special import Special
from headwise.policies.window import Window
from oracle import rows_of, scores_of, use_oracle
from passes import play

POLICIES = [
    headwise.Full(),
    headwise.Window(7),
    headwise.Window(0.4),
    headwise.StreamingLLM(window=9, sinks=3),
    headwise.H2O(heavy=5, recent=4),
    headwise.H2O(heavy=0.2, recent=0.1),
    headwise.Random(keep=0.5, seed=3),
    headwise.Random(keep=8),
    Special() | Punctuation(),
    Special(),
    Window(0),
    Frequent(0.3),
    Frequent(0.3, normalize=True) | Sinks(2),
    *[headwise.FastGen(recovery) for recovery in (0.0, 0.4, 0.6, 0.75, 0.85, 1.0)],
    headwise.FastGen(0.7, rows="last", last_rows=5),
    headwise.FastGen(0.6, fold="mean", criterion="l1", sinks=2),
    headwise.FastGen(0.4, local=0.11, frequent=0.13, normalize=True),
    headwise.FastGen(
        0.5,
        ladder=("special", "local", Window(11) | Sinks(3), "frequent", "special+local", "punctuation+frequent", "full"),
    ),
]


def compare(policy, ids, mask, *, model, steps=(1, 1, 1, 1, 5, 1, 2, 1, 1, 1, 1), evict_every=1, kernels=("cpu",)):
    """The caches with those kernels after the last pass; the oracle plays once for all of them."""
    options = {"tokenizer": tiny.tokenizer(), "evict_every": evict_every}
    continuation = tiny.prompt(sum(steps), seed=9, batch=len(ids))
    oracle = use_oracle(headwise.HeadwiseCache(model, policy, **options))
    expected = play(model, oracle, ids, mask, continuation, steps)
    caches = [headwise.HeadwiseCache(model, policy, page_size=4, kernel=kernel, **options) for kernel in kernels]
    for ours in caches:
        agree(ours, play(model, ours, ids, mask, continuation, steps), oracle, expected, mask)
    return caches


def agree(ours, got, oracle, expected, mask):
    for ours_layer, oracle_layer in zip(ours.headwise_layers, oracle.headwise_layers, strict=True):
        assert torch.equal(ours_layer.core.plan.choice, oracle_layer.core.choice)
        if oracle_layer.core.recovered is not None:
            torch.testing.assert_close(ours_layer.core.plan.recovered, oracle_layer.core.recovered, atol=1e-5, rtol=0)
        assert rows_of(ours_layer.core) == rows_of(oracle_layer.core)
        if ours_layer.core.plan.scored:
            mine, its = scores_of(ours_layer.core, oracle_layer.core)
            torch.testing.assert_close(mine, its, atol=1e-4, rtol=1e-4)
    real = mask.bool()
    torch.testing.assert_close(got[0][real], expected[0][real], atol=2e-4, rtol=1e-4)
    for mine, its in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(mine, its, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(("kernels", "evict_every"), [(("cpu", "reference"), 1), (("cpu",), 3), (("reference",), 100)])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_left_padded_batch_agrees_with_the_oracle(policy, kernels, evict_every):
    """Exact eviction, amortised eviction, and appending alone; the compiled kernels and the plain ones."""
    ids, mask = tiny.left_padded(tiny.prompt(23, seed=1)[0], tiny.prompt(37, seed=2)[0], tiny.prompt(5, seed=3)[0])
    cache, *more = compare(policy, ids, mask, model=tiny.llama(), kernels=kernels, evict_every=evict_every)
    if evict_every == 100:
        appended = [[16] * 2] * 3
        for layer, before in zip(cache.headwise_layers, prompt_lengths(policy, ids, mask), strict=True):
            assert (layer.core.store.lengths - before).tolist() == appended
        return
    evicting = not isinstance(policy, headwise.Full) and policy != headwise.FastGen(1.0)
    given = (int(mask.sum()) + 16 * len(ids)) * 3 * 2
    for each in (cache, *more):
        kept = sum(int(layer.sum()) for layer in each.report().kept_tokens)
        assert kept < 0.9 * given if evicting else kept == given


def prompt_lengths(policy, ids, mask):
    """Kept rows of every head after the prompt alone."""
    model = tiny.llama()
    cache = headwise.HeadwiseCache(model, policy, tokenizer=tiny.tokenizer())
    play(model, cache, ids, mask, None, ())
    return [layer.core.store.lengths for layer in cache.headwise_layers]


def test_amortised_eviction_lets_a_head_hold_so_many_rows_more():
    model, ids = tiny.llama(), tiny.prompt(30)
    cache = headwise.HeadwiseCache(model, headwise.Window(8), evict_every=5)
    held = []
    with torch.no_grad():
        for new in [ids, *torch.arange(10, 22)[:, None, None]]:
            model(input_ids=new, past_key_values=cache)
            held.append({int(n) for kept in cache.report().kept_tokens for n in kept.flatten()})
    assert held == [{n} for n in (8, 9, 10, 11, 12, 8, 9, 10, 11, 12, 8, 9, 10)]


@pytest.mark.parametrize("wrong", [0, -1])
def test_evict_every_must_be_a_count(wrong):
    with pytest.raises(headwise.ConfigurationError, match="evict_every must be a count of 1 or more"):
        headwise.HeadwiseCache(tiny.llama(), headwise.Window(8), evict_every=wrong)


@pytest.mark.parametrize("heads", [(6, 6), (6, 1), (5, 5), (8, 2)], ids=str)
def test_every_grouping_agrees_with_the_oracle(heads):
    ids = tiny.prompt(41, seed=4)
    model = tiny.llama(heads=heads[0], kv_heads=heads[1], head_dim=10)
    compare(headwise.FastGen(0.7), ids, torch.ones_like(ids), model=model)
    compare(headwise.H2O(0.2, 3), ids, torch.ones_like(ids), model=model)


@pytest.mark.parametrize("length", [1, 2, 3, 17])
@pytest.mark.parametrize("policy", [headwise.FastGen(0.8), headwise.H2O(3, 2), headwise.StreamingLLM(4)], ids=str)
def test_short_prompts_agree_with_the_oracle(policy, length):
    ids = tiny.prompt(length, seed=5)
    compare(policy, ids, torch.ones_like(ids), model=tiny.llama())


@pytest.mark.parametrize(
    "ids", [[[0, 1, 0, 2, 1, 0, 0]], [[50, 51, 52, 53, 54, 55, 56, 57, 58]]], ids=["special", "plain"]
)
def test_prompts_of_one_kind_agree_with_the_oracle(ids):
    ids = torch.tensor(ids)
    compare(headwise.FastGen(0.0), ids, torch.ones_like(ids), model=tiny.llama())
    compare(headwise.FastGen(0.8), ids, torch.ones_like(ids), model=tiny.llama())
