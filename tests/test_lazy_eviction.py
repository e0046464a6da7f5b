"""LazyEviction: when tokens were looked at, and after how long again, against loops over queries and tokens."""

from __future__ import annotations

import math

import pytest
import torch

import headwise
from headwise.errors import ConfigurationError
from headwise.policies.lazy_eviction import _packed, _unpacked
from rechoosing import EVERY, PASSES, PROMPT, follow, held, new
from rechoosing_oracle import Recording, best, count_of, heads_of, newest
from scored_prompts import words


class Watched:
    """What is known of the tokens of one head: when each was last active, and its longest interval."""

    def __init__(self, policy):
        self.policy, self.last, self.longest = policy, {}, {}

    def look(self, head, queries, known_from):
        """Take in what the newest queries gave, one after the other."""
        for column in head.held:
            self.last.setdefault(column, max(column, known_from))
            self.longest.setdefault(column, 0)
        for column in range(max(0, head.seen - queries), head.seen):
            rows = [head.attention(group, column) for group in range(len(head.query))]
            for c in head.held:
                if max(row.get(c, 0.0) for row in rows) >= self.policy.threshold:
                    self.longest[c] = max(self.longest[c], column - self.last[c])
                    self.last[c] = column

    def worth(self, head):
        """The importance of every token that is held."""
        scores = {}
        for c in head.held:
            away, longest = head.seen - 1 - self.last[c], self.longest[c]
            ratio = away / (longest + 1e-5)
            scores[c] = 2 / (1 + math.exp(1 + ratio)) if ratio < 700 else 0.0
            if longest:
                scores[c] += 2 / (1 + math.exp(longest - 1))
        return newest(scores, head, self.policy.window)


@pytest.mark.parametrize(
    "policy",
    [
        headwise.LazyEviction(0.3, window=6, threshold=0.05, choose_every=EVERY),
        headwise.LazyEviction(15, window=3, threshold=0.02, choose_every=EVERY),
        headwise.LazyEviction(0.4, window=11, threshold=0.08, choose_every=EVERY),
    ],
    ids=str,
)
def test_tokens_stay_that_come_back(policy):
    cache, expected, since, read, chosen = new(policy), [], PROMPT, PROMPT, 0
    watched = [[Watched(policy) for _ in range(2)] for _ in range(3)]

    def choose(seen, queries, known_from):
        for layer, each in enumerate(expected):
            for h, head in enumerate(heads_of(record, layer, each, seen)):
                watched[layer][h].look(head, queries, known_from)
                expected[layer][h] = best(watched[layer][h].worth(head), count_of(policy.keep, seen))

    def compare(seen):
        nonlocal expected, since, read, chosen
        if seen == PROMPT:
            expected = [[set(range(PROMPT)) for _ in range(2)] for _ in range(3)]
            choose(PROMPT, policy.window, PROMPT - policy.window - 1)
        else:
            expected = [[head | set(range(read, seen)) for head in layer] for layer in expected]
            if seen - since >= EVERY:
                since, chosen = seen, chosen + 1
                choose(seen, EVERY, 0)
        read = seen
        assert held(cache) == expected, seen

    with Recording() as record:
        follow(cache, words(98, seed=5), PASSES[:20], compare)
    assert chosen == 5
    # Otherwise nothing would be tested: some came back, and some did not.
    intervals = [n for layer in watched for head in layer for n in head.longest.values()]
    assert max(intervals) > 3 and min(intervals) == 0


def test_two_counts_are_one_number():
    since, longest = torch.tensor([[[0, 3, 2047, 60_000]]]), torch.tensor([[[0, 7, 1, 99_999]]])
    back = _unpacked(_packed(since, longest))
    assert _packed(since, longest).dtype is torch.float32
    assert back[0].tolist() == [[[0, 3, 2047, 60_000]]] and back[1].tolist() == [[[0, 7, 1, 65_504]]]
    assert (_packed(torch.zeros(1, 1, 2).long(), torch.zeros(1, 1, 2).long()) == 0).all()


@pytest.mark.parametrize("given", [{"threshold": 0}, {"threshold": 1.5}, {"threshold": True}, {"window": 0}])
def test_what_cannot_be_is_refused(given):
    with pytest.raises(ConfigurationError):
        headwise.LazyEviction(0.5, **given)
