"""Matched rows when more tokens have come: those that stay keep what was fitted, and choices see it."""

from __future__ import annotations

import pytest
import torch

from headwise import Auto, Match, SnapKV
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
