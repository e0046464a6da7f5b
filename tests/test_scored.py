"""Policies that score the prompt: every one against its paper's formula, in loops over whole attention matrices."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import headwise
from headwise.hosts.transformers import repetition
from headwise.policies.scored import across, highest
from rule_facts import facts
from scored_oracle import count_of, expect
from scored_prompts import PADS, TOKENS, kept, padded, policy, read, words

__all__ = ["policy"]


def test_keeps_what_the_formula_says(policy):
    ids = words(TOKENS, seed=3)
    assert [layer[0] for layer in kept(read(policy, ids))] == expect(policy, ids)


@pytest.mark.parametrize("chunk", [11, 46])
@pytest.mark.parametrize("policy", [headwise.KVzip(0.25), headwise.PeakAttention(keep=0.4, window=5)], ids=str)
def test_repeats_in_several_chunks(policy, chunk, monkeypatch):
    monkeypatch.setattr(repetition, "_CHUNK", chunk)
    ids = words(TOKENS, seed=4)
    assert [layer[0] for layer in kept(read(policy, ids))] == expect(policy, ids, chunk)


# One prompt, given in different ways.


def test_a_sequence_keeps_in_a_batch_what_it_keeps_alone(policy):
    prompts = [words(TOKENS, seed=1)[0], words(TOKENS - PADS, seed=2)[0]]
    together = kept(read(policy, *padded(*prompts)))
    for row, prompt in enumerate(prompts):
        pads = TOKENS - len(prompt)
        for both, alone in zip(together, kept(read(policy, prompt[None])), strict=True):
            assert both[row] == [{column + pads for column in head} for head in alone[0]]


@pytest.mark.parametrize("pieces", [7, 46])
def test_a_prompt_in_pieces_keeps_what_it_keeps_at_once(policy, pieces):
    ids, mask = padded(words(TOKENS, seed=1)[0], words(TOKENS - PADS, seed=2)[0])
    assert kept(read(policy, ids, mask, pieces=pieces)) == kept(read(policy, ids, mask))


def test_working_memory_makes_no_difference(policy, monkeypatch):
    ids = words(TOKENS, seed=6)
    usual = kept(read(policy, ids))
    monkeypatch.setattr("headwise.kernels.attention._BLOCK_LOGITS", 600)
    assert kept(read(policy, ids)) == usual


# Numbers by hand.

SCORES = [0.5, -1.0, 0.5, -0.25, 3.0, -1.0]


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (0, []),
        (1, [4]),
        (2, [0, 4]),  # of two equal ones the earlier
        (3, [0, 2, 4]),
        (5, [0, 1, 2, 3, 4]),
        (9, [0, 1, 2, 3, 4, 5]),
        (0.0, []),
        (0.5, [0, 2, 4]),
        (0.51, [0, 2, 3, 4]),  # 3.06, rounded up
        (1.0, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_the_highest_stay(keep, expected):
    tokens = facts(positions=range(6), prompt=6)
    chosen = highest(torch.tensor([[SCORES]]), tokens, headwise.KeyNorm(keep).quota(tokens))
    assert chosen[0, 0].nonzero().flatten().tolist() == expected


def test_the_highest_of_several_layers_and_heads():
    tokens = [facts(positions=range(3), heads=2), facts(positions=range(3), heads=2)]
    scores = [torch.tensor([[[1.0, 5, 2], [-3, 2, 9]]]), torch.tensor([[[2.0, 0, 2], [8, -1, -2]]])]
    low, high = across(scores, tokens, torch.tensor([[[5]]]))
    # 9, 8, 5, and of the four twos the first two.
    assert low.tolist() == [[[False, True, True], [False, True, True]]]
    assert high.tolist() == [[[False, False, False], [True, False, False]]]


def test_rank_orders_priorities_of_any_sign():
    special = [-math.inf, math.inf, -0.0, 0.0, -1e-45, 1e-45, -3.4e38, 3.4e38, -1.0, 1.0]
    priority = torch.cat([torch.tensor(special), torch.randn(30), -torch.arange(5.0)])[torch.randperm(45)]
    valid = [bool(draw) for draw in torch.rand(45) < 0.8]
    tokens = facts(positions=range(45), valid=valid)
    ranks = tokens.rank(priority.view(1, 1, -1))[0, 0].tolist()
    values = priority.tolist()
    ordered = sorted((j for j in range(45) if valid[j]), key=lambda j: (-values[j], j))
    assert [ranks[j] for j in ordered] == list(range(len(ordered)))
    assert sorted(ranks) == list(range(45))


@pytest.mark.parametrize("policy", [headwise.SnapKV(5), headwise.PyramidKV(5), headwise.Scissorhands(5)], ids=str)
def test_a_prompt_shorter_than_the_window_keeps_its_end(policy):
    assert TOKENS < 64
    found = kept(read(replace(policy, **({"recent": 64} if policy.name == "scissorhands" else {})), words(13)))
    assert found == [[[set(range(8, 13))] * 2]] * 3


def test_expected_attention_of_a_prompt_of_sinks():
    assert kept(read(headwise.ExpectedAttention(2), words(3))) == [[[{0, 1}] * 2]] * 3


def test_a_budget_beyond_the_prompt_keeps_all(policy):
    ids = words(12)
    assert kept(read(policy.with_keep(1000), ids)) == [[[set(range(12))] * 2]] * 3


# Budgets that are shared.


@pytest.mark.parametrize("safeguard", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("keep", [1, 9, 0.3])
@pytest.mark.parametrize("over", ["keydiff", "expected-attention", headwise.SnapKV(1, window=3)], ids=str)
def test_adakv_shares_the_budget_of_a_layer(safeguard, keep, over):
    prompts = [words(TOKENS, seed=1)[0], words(TOKENS - PADS, seed=2)[0]]
    cache = read(headwise.AdaKV(keep, over=over, safeguard=safeguard), *padded(*prompts))
    sizes = [[[len(head) for head in sequence] for sequence in layer] for layer in kept(cache)]
    for layer in sizes:
        for prompt, heads in zip(prompts, layer, strict=True):
            quota = count_of(keep, len(prompt))
            assert sum(heads) == quota * 2
            assert min(heads) >= int(quota * safeguard)
    if safeguard == 1.0:
        assert all(len(set(heads)) == 1 for layer in sizes for heads in layer)
    elif keep != 1 and over != "keydiff":
        assert any(len(set(heads)) > 1 for layer in sizes for heads in layer)


@pytest.mark.parametrize("layers", [1, 2, 7, 30])
@pytest.mark.parametrize("keep", [0, 30, 0.07, 0.3, 0.5, 0.9, 1.0, 5000])
def test_pyramidkv_has_the_mean_it_is_given(layers, keep):
    policy = headwise.PyramidKV(keep, window=16)
    tokens = facts(positions=range(500), prompt=500)
    budgets = [int(policy.quota(replace(tokens, layer=layer, layers=layers))) for layer in range(layers)]
    mean = count_of(keep, 500)
    assert budgets == sorted(budgets, reverse=True)
    # Every layer is rounded for itself.
    assert abs(sum(budgets) - mean * layers) <= layers / 2
    if keep in (0.5, 0.9) and layers > 1:
        assert budgets[0] == 484 and budgets[-1] == 2 * mean - 484
    if keep in (0, 30, 0.07):
        assert set(budgets) == {mean}


@pytest.mark.parametrize("keep", [0, 5, 0.31, 1.0])
def test_kvzip_shares_the_budget_of_the_model(keep):
    prompts = [words(TOKENS, seed=1)[0], words(TOKENS - PADS, seed=2)[0]]
    layers = kept(read(headwise.KVzip(keep, sinks=0), *padded(*prompts)))
    for row, prompt in enumerate(prompts):
        sizes = [len(head) for layer in layers for head in layer[row]]
        assert sum(sizes) == count_of(keep, len(prompt)) * len(sizes)
        assert (len(set(sizes)) > 1) == (keep in (5, 0.31))
