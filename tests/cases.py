"""Cases: the axes of a test -> the combinations it runs: all, or such that every value or every two values occur."""

from __future__ import annotations

import itertools
import math
import os

import pytest

# `make test-all` sets it.
EVERYTHING = os.environ.get("HEADWISE_ALL_CASES") == "1"


def pairwise(indirect=(), **axes):
    """A parametrization by the named axes in which any two values of two axes meet in some case.

    Whoever breaks one value, or the way two of them go together, is found; that takes about as many cases as the two
    longest axes have combinations. With HEADWISE_ALL_CASES=1 it is the full product.

    Args:
        indirect: axes that are the parameters of fixtures of that name; the test need not take them.
        axes: a list of values each.
    """
    return _parametrized(indirect, axes, rows)


def singly(indirect=(), **axes):
    """The same with as few cases as the longest axis has values: the others take turns."""
    return _parametrized(indirect, axes, lambda sizes: turns(sizes) if not EVERYTHING else rows(sizes))


def turns(sizes):
    """Combinations in which every index occurs."""
    return [tuple(i % size for size in sizes) for i in range(max(sizes))]


def _parametrized(indirect, axes, choose):
    values = [list(axis) for axis in axes.values()]
    cases = [[axis[i] for axis, i in zip(values, case, strict=True)] for case in choose([len(v) for v in values])]
    parametrized = pytest.mark.parametrize(list(axes), cases, indirect=list(indirect), ids=str)

    def mark(test):
        return pytest.mark.usefixtures(*indirect)(parametrized(test)) if indirect else parametrized(test)

    return mark


def rows(sizes, everything=None):
    """Combinations of indices below those sizes, in a fixed order: all, or few in which every two indices meet."""
    if EVERYTHING if everything is None else everything:
        return list(itertools.product(*map(range, sizes)))
    axes = range(len(sizes))
    if len(sizes) < 2:
        return [(i,) for i in range(math.prod(sizes))]
    # Ordered, as a set is not.
    open_pairs = dict.fromkeys(
        ((i, a), (j, b)) for i, j in itertools.combinations(axes, 2) for a in range(sizes[i]) for b in range(sizes[j])
    )
    used = dict.fromkeys(((i, a) for i in axes for a in range(sizes[i])), 0)
    chosen = []
    while open_pairs:
        row = dict(next(iter(open_pairs)))
        # The longest axes have the most to meet.
        for axis in sorted(set(axes) - set(row), key=lambda i: -sizes[i]):

            def gain(value, axis=axis, row=row):
                met = sum(tuple(sorted(((axis, value), other))) in open_pairs for other in row.items())
                return met, -used[axis, value], -value

            row[axis] = max(range(sizes[axis]), key=gain)
        chosen.append(tuple(row[axis] for axis in axes))
        for item in row.items():
            used[item] += 1
        for pair in itertools.combinations(sorted(row.items()), 2):
            open_pairs.pop(pair, None)
    return sorted(chosen)
