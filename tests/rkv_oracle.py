"""R-KV, the long way: keys and attention of one KV head, by column -> importance and redundancy of each."""

from __future__ import annotations

import math


def importance(columns, asked, kernel):
    """Of attention by query head and query: the most of a group, then of neighbours, then the mean over queries."""
    reach, found = kernel // 2, dict.fromkeys(columns, 0.0)
    queries = sorted({query for query, _ in asked})
    for query in queries:
        most = [max(row.get(c, 0.0) for q, row in asked if q == query) for c in columns]
        for place, column in enumerate(columns):
            found[column] += max(most[max(0, place - reach) : place + reach + 1]) / len(queries)
    return found


def redundancy(columns, keys, alike, spared):
    """A softmax of mean cosines; for each key, those that are alike and newest count as nothing."""
    total = dict.fromkeys(columns, 0.0)
    for one in columns:
        cosines = {c: float(keys[one] @ keys[c] / keys[one].norm() / keys[c].norm()) for c in columns if c != one}
        cosines[one] = 0.0
        newest = sorted((c for c in columns if cosines[c] > alike), reverse=True)[:spared]
        for column in columns:
            total[column] += 0.0 if column in newest else cosines[column]
    powers = {c: math.exp(total[c] / len(columns)) for c in columns}
    return {c: power / sum(powers.values()) for c, power in powers.items()}


def worth(policy, columns, keys, asked):
    """What each column is worth, but for the newest, which are kept."""
    important = importance(columns, asked, policy.kernel)
    redundant = redundancy(columns, keys, policy.alike, policy.spared)
    return {c: policy.weight * important[c] - (1 - policy.weight) * redundant[c] for c in columns}
