"""Select: scores of all heads for several tasks -> the heads to steer, as PASTA's Algorithm 1 takes them.

Zhang et al., ICLR 2024, section 3.2: those among the best k for every task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from headwise.errors import ConfigurationError

# Scores of query heads by layer.
Scores = Mapping[int, Sequence[float]]


def ranked(scores: Scores) -> list[tuple[int, int]]:
    """All heads as (layer, head), the best first; of equal ones the first."""
    everything = [(-score, layer, head) for layer, own in scores.items() for head, score in enumerate(own)]
    return [(layer, head) for _, layer, head in sorted(everything)]


def among_the_best(tasks: Sequence[Scores], keep: int) -> list[tuple[int, int]]:
    """The heads that are among the best `keep` for every task, in the order of their layers.

    Raises:
        ConfigurationError: when there are none.
    """
    common = set.intersection(*(set(ranked(scores)[:keep]) for scores in tasks))
    if not common:
        raise ConfigurationError(f"no head is among the best {keep} for all of {len(tasks)} tasks; take more")
    return sorted(common)


def at_most(tasks: Sequence[Scores], heads: int) -> tuple[list[tuple[int, int]], int]:
    """As many heads as that at most, and the largest `keep` with which there are no more.

    Raises:
        ConfigurationError: when that would be none.
    """
    orders = [ranked(scores) for scores in tasks]
    best: tuple[list[tuple[int, int]], int] = [], 0
    common: dict[tuple[int, int], int] = {}
    for keep in range(1, len(orders[0]) + 1):
        for order in orders:
            common[order[keep - 1]] = common.get(order[keep - 1], 0) + 1
        found = sorted(head for head, count in common.items() if count == len(tasks))
        if len(found) > heads:
            break
        best = found, keep
    if not best[0]:
        raise ConfigurationError(f"there are no {heads} heads or fewer that all {len(tasks)} tasks have in common")
    return best


def by_layer(heads: Sequence[tuple[int, int]]) -> dict[int, list[int]]:
    """Heads as files have them."""
    found: dict[int, list[int]] = {}
    for layer, head in heads:
        found.setdefault(layer, []).append(head)
    return found
