"""Choosing again, the long way: what a layer was given, pass by pass -> what its heads hold after every choice.

Loops over tokens in double precision, one sequence. The papers' formulas over the rows that are held, nothing of
headwise in them.
"""

from __future__ import annotations

import math
from unittest.mock import patch

import torch

import rkv_oracle
from headwise.stages.layer import LayerCache


class Recording:
    """Queries, keys and values of every layer, by column, as a cache is given them.

    Attributes:
        repeated: the same of the last repetition, by layer, of tokens that are in no column.
    """

    def __init__(self):
        self.layers, self.repeated = {}, {}

    def __enter__(self):
        own = LayerCache.attend

        def attend(core, query, keys, values, mask, options):
            given = [part[0].double() for part in (query, keys, values)]
            if core.repetition_chunk is None:
                self.layers.setdefault(core.index, []).append(given)
            else:
                self.repeated[core.index] = given
            self.scaling = options.scaling
            return own(core, query, keys, values, mask, options)

        self._patch = patch.object(LayerCache, "attend", attend)
        self._patch.start()
        return self

    def __exit__(self, *_):
        self._patch.stop()

    def of(self, layer):
        """Queries `[h, g, t, d]`, keys and values `[h, t, d]`."""
        return [torch.cat(parts, dim=-2) for parts in zip(*self.layers[layer], strict=True)]


class Head:
    """What is known of one KV head: its own tensors, and the columns that it holds."""

    def __init__(self, query, keys, values, scaling, held, seen):
        self.query, self.keys, self.values, self.scaling = query, keys, values, scaling
        self.held, self.seen = sorted(held), seen

    def attention(self, group, column):
        """What a query gives each column that is held, by column."""
        seen = [c for c in self.held if c <= column]
        weights = (self.keys[seen] @ self.query[group, column] * self.scaling).softmax(0).tolist()
        return dict(zip(seen, weights, strict=True))

    def asked(self, window):
        """Attention of every query of the newest columns."""
        return [
            (column, self.attention(group, column))
            for group in range(len(self.query))
            for column in range(max(0, self.seen - window), self.seen)
        ]


def newest(scores, head, count):
    return {c: 1000.0 + c if c >= head.seen - count else score for c, score in scores.items()}


def snapkv(policy, heads):
    found = []
    for head in heads:
        asked = head.asked(policy.window)
        votes = [sum(row.get(c, 0.0) for _, row in asked) for c in head.held]
        votes = [0.0 if c >= head.seen - policy.window else v for c, v in zip(head.held, votes, strict=True)]
        reach = policy.kernel // 2
        smooth = [sum(votes[max(0, i - reach) : i + reach + 1]) for i in range(len(votes))]
        found.append(newest(dict(zip(head.held, smooth, strict=True)), head, policy.window))
    return found


def tova(policy, heads):
    rows = [row for head in heads for _, row in head.asked(1)]
    return [newest({c: sum(row.get(c, 0.0) for row in rows) for c in head.held}, head, 1) for head in heads]


def keynorm(policy, heads):
    return [{c: -math.sqrt(sum(float(x) ** 2 for x in head.keys[c])) for c in head.held} for head in heads]


def keydiff(policy, heads):
    found = []
    for head in heads:
        mean = sum(head.keys[c] / head.keys[c].norm() for c in head.held)
        found.append({c: -float(head.keys[c] @ mean / head.keys[c].norm() / mean.norm()) for c in head.held})
    return found


def scissorhands(policy, heads):
    found = []
    for head in heads:
        asked = head.asked(policy.history)
        counts = {c: float(sum(row.get(c, 0.0) * len(row) > 1 for _, row in asked)) for c in head.held}
        found.append(newest(counts, head, policy.recent))
    return found


def rkv(policy, heads):
    return [
        newest(rkv_oracle.worth(policy, head.held, head.keys, head.asked(policy.window)), head, policy.window)
        for head in heads
    ]


FORMULAS = {
    "rkv": rkv,
    "snapkv": snapkv,
    "tova": tova,
    "keynorm": keynorm,
    "keydiff": keydiff,
    "scissorhands": scissorhands,
}


def count_of(size, seen):
    return math.ceil(size * seen - 1e-9) if isinstance(size, float) else size


def best(scores, count):
    """The columns with the highest scores; of equal ones the first."""
    return set(sorted(scores, key=lambda c: (-scores[c], c))[:count])


def choose(policy, heads):
    """What a layer's heads keep."""
    quota = count_of(policy.keep, heads[0].seen)
    if policy.name != "adakv":
        return [best(scores, quota) for scores in FORMULAS[policy.name](policy, heads)]
    scores = FORMULAS[policy.over.name](policy.over, heads)
    own = [best(each, int(quota * policy.safeguard + 1e-9)) for each in scores]
    left = {(h, c): s for h, each in enumerate(scores) for c, s in each.items() if c not in own[h]}
    rest = sorted(left, key=lambda at: -left[at])[: quota * len(heads) - sum(map(len, own))]
    return [own[h] | {c for head, c in rest if head == h} for h in range(len(heads))]


def heads_of(recording, layer, held, seen):
    query, keys, values = recording.of(layer)
    return [Head(query[h], keys[h], values[h], recording.scaling, held[h], seen) for h in range(len(held))]


def raised(peaks, head, asked, near):
    """What the columns had, or were given since by one of these queries that is far enough away."""
    for column in asked:
        for row in (head.attention(group, column) for group in range(len(head.query))):
            for c, weight in row.items():
                if column - c >= near:
                    peaks[c] = max(peaks.get(c, 0.0), weight)
    return {c: peaks.get(c, 0.0) for c in head.held}


def repeated(peaks, head, query, keys, chunk, added=lambda column: 0.0):
    """What the columns had, or those of a chunk were given by a query that repeats it, of one KV head.

    Args:
        query: `[g, q, d]`, of the tokens that repeat.
        keys: `[q, d]`, of the same.
        added: to the logits of a column.
    """
    chunk = [c for c in head.held if c in chunk]
    counted = [c for c in head.held if c < 4 and c not in chunk] + chunk
    for row, asked in [(row, asked) for group in query for row, asked in enumerate(group)]:
        seen = torch.cat([head.keys[counted], keys[: row + 1]])
        logits = seen @ asked * head.scaling
        logits = logits + torch.tensor([*map(added, counted), *[0.0] * (row + 1)])
        weights = dict(zip(counted, logits.softmax(0).tolist()[: len(counted)], strict=True))
        for c in chunk:
            peaks[c] = max(peaks.get(c, 0.0), weights[c])
    return peaks
