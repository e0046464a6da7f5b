"""Matched rows when more tokens have come: those that stay keep what was fitted, and choices see it."""

from __future__ import annotations

import pytest
import torch

import headwise
from headwise import Auto, Match, SnapKV
from headwise.types import LogitOptions
from rechoosing import PASSES, PROMPT, follow, held, new
from scored_prompts import words


def fitted(cache):
    """Bias and value of every row, by layer, head and column."""
    found = {}
    for number, layer in enumerate(cache.headwise_layers):
        rows = layer.core.store.rows()
        for h in range(rows.keep.shape[1]):
            for n in rows.keep[0, h].nonzero().flatten().tolist():
                bias = 0.0 if rows.biases is None else float(rows.biases[0, h, n])
                found[number, h, int(rows.columns[0, h, n])] = bias, rows.values[0, h, n]
    return found


@pytest.mark.parametrize("policy", [SnapKV(0.3, window=5, choose_every=5), Auto(ratio=0.4, window=5, choose_every=5)])
def test_rows_keep_their_biases_and_values_and_sizes_hold(policy):
    cache, before, since = new(Match(policy)), {}, PROMPT

    def compare(seen):
        nonlocal before, since
        now = fitted(cache)
        for row, (bias, value) in now.items():
            if row in before:
                assert bias == before[row][0]
                # What falls to fewer bits is read a little off.
                torch.testing.assert_close(value, before[row][1], atol=0 if isinstance(policy, SnapKV) else 1, rtol=0)
            elif before:
                assert bias == 0 and row[2] >= PROMPT
        if isinstance(policy, SnapKV) and seen - since >= 5:
            since = seen
            assert {len(head) for layer in held(cache) for head in layer} == {-(-3 * seen // 10)}
        before = now

    follow(cache, words(98, seed=5), PASSES[:20], compare)
    biases = [bias for (_, _, column), (bias, _) in before.items() if column < PROMPT]
    assert sum(bias != 0 for bias in biases) > 5


def test_attention_that_choices_look_at_has_the_biases():
    torch.manual_seed(3)
    query, keys, biases = torch.randn(1, 2, 3, 4, 8), torch.randn(1, 2, 11, 8), torch.randn(1, 2, 11)
    position = torch.arange(11).expand(1, 2, -1)
    at = torch.arange(7, 11)[None]
    evidence = headwise.Evidence(
        query=query,
        keys=keys,
        read_values=lambda: keys,
        read_spans=lambda: (biases, biases),
        value_dim=8,
        asked=torch.ones(1, 4, dtype=torch.bool),
        query_position=at,
        mask=position[:, :, None] <= at[:, None, :, None],
        options=LogitOptions(0.4),
        position=position,
        real=torch.ones(1, 2, 11, dtype=torch.bool),
        length=torch.full((1, 1, 1), 11),
        rotation=None,
        repetition_peaks=None,
        biases=biases,
    )
    found = torch.cat(list(evidence.attention(4)), dim=3)
    for h in range(2):
        logits = 0.4 * query[0, h] @ keys[0, h].T + biases[0, h]
        expected = logits.masked_fill(torch.arange(11) > at[0][:, None], -torch.inf).softmax(dim=-1)
        torch.testing.assert_close(found[0, h], expected)
