"""The helper that thins out products of parameters: every two values still meet, every time in the same cases."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cases import pairwise, rows, turns


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_every_two_values_meet(sizes):
    found = rows(sizes, everything=False)
    for i, j in itertools.combinations(range(len(sizes)), 2):
        assert {(row[i], row[j]) for row in found} == set(itertools.product(range(sizes[i]), range(sizes[j])))
    assert {len(row) for row in found} == {len(sizes)}
    assert len(set(found)) == len(found) <= math.prod(sizes)
    assert found == rows(sizes, everything=False)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_every_value_has_its_turn(sizes):
    found = turns(sizes)
    assert len(found) == max(sizes)
    assert [len(set(column)) for column in zip(*found, strict=True)] == sizes


def test_few_cases_are_enough():
    assert len(rows([3, 2, 2, 3, 3, 2, 2], everything=False)) <= 15
    assert len(rows([3, 2, 2, 3, 3, 2, 2], everything=True)) == 432


@pytest.fixture
def doubled(request):
    return 2 * request.param


@pairwise(indirect=["doubled"], doubled=[1, 2], other=[3])
def test_an_axis_may_be_the_parameter_of_a_fixture(doubled, other):
    assert doubled in (2, 4)
    assert other == 3


def test_single_axes_are_whole():
    def test(one):
        pass

    assert [mark.args[1] for mark in pairwise(one=[5, 6])(test).pytestmark] == [[[5], [6]]]
