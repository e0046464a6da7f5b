"""Curves: points of every policy, the Pareto front, and names that do not touch."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.eval.compare.curves import spread
from headwise.eval.compare.points import bytes_panels, pareto_front, speed_panels


@given(st.lists(st.tuples(*[st.sampled_from([0.0, 1.0, 2.0, 3.0, 4.0])] * 2), max_size=12))
def test_the_front_is_what_a_sweep_finds(points):
    best, found = -1.0, set()
    # From the right to the left, and of equal places the highest first: whoever is above all before is on the front.
    for x, y in sorted(set(points), reverse=True):
        if y > best:
            best = y
            found.add((x, y))
    assert pareto_front(points) == [point in found for point in points]


@given(st.lists(st.floats(0, 100), max_size=8), st.floats(1, 10))
def test_names_are_spread_and_stay_in_order(places, gap):
    top = 100.0
    moved = spread(places, gap, top)
    order = sorted(range(len(places)), key=places.__getitem__)
    distances = [moved[above] - moved[below] for below, above in pairwise(order)]
    assert all(distance >= gap - 1e-9 for distance in distances)
    assert all(place <= top for place in moved)
    assert spread(moved, gap, top) == pytest.approx(moved)


def test_names_move_up_while_there_is_room():
    assert spread([5.0, 0.0, 0.0, 60.0], 10.0, 100.0) == [20.0, 0.0, 10.0, 60.0]
    assert spread([95.0, 98.0], 10.0, 100.0) == [90.0, 100.0]


def made_up(higher=True, query="agnostic"):
    """Results of a policy at two sizes, beside random eviction."""
    labels = {"full": "full", "p at 2": "p", "random, 2": "random", "p at 1": "p", "random, 1": "random"}
    # Score, bytes and speed.
    numbers = {"full": (9.0, 100.0, 10.0), "p at 2": (8.0, 50.0, 20.0), "random, 2": (3.0, 50.0, 20.0)}
    numbers |= {"p at 1": (4.0, 20.0, 25.0), "random, 1": (5.0, 20.0, 24.0)}

    def rows(place, metric):
        return [
            {"policy": label, "twin_of": None, "items": 2, "used_bytes": size, "kept_ratio": size / 100}
            | {"over_random": None, "compress_seconds": 0.5}
            | {"metrics": {metric: {"mean": values[place], "low": values[place] - 1, "high": values[place] + 1}}}
            for label, values in numbers.items()
            for size in (values[1],)
        ]

    task = {"title": "t", "query": query, "primary": "score", "higher_is_better": higher, "rows": rows(0, "score")}
    quick = {"title": "speed", "query": "none", "primary": "tokens_per_second", "higher_is_better": True}
    summaries = [quick | {"rows": rows(2, "tokens_per_second")}, task]
    lineup = [{"label": label, "series": series} for label, series in labels.items()]
    return {"configuration": {"lineup": lineup}, "summaries": summaries, "units": []}


def test_panels_have_the_rows_of_the_tables():
    (panel,) = bytes_panels(made_up())
    assert (panel.title, panel.metric) == ("t, query-agnostic", "score")
    assert list(panel.series) == ["p", "random"]
    assert [(p.label, p.cost, p.quality, p.low, p.high) for p in panel.series["p"]] == [
        ("p at 1", 20, 4, 3, 5),
        ("p at 2", 50, 8, 7, 9),
    ]
    assert panel.full.quality == 9
    fronts = {p.label for points in panel.series.values() for p in points if p.front}
    assert fronts == {"random, 1", "p at 2"}
    (panel,) = bytes_panels(made_up(higher=False, query="none"))
    assert panel.title == "t"
    assert {p.label for points in panel.series.values() for p in points if p.front} == {"p at 1", "random, 2"}


def test_panels_of_speed_join_two_tasks():
    (panel,) = speed_panels(made_up())
    assert [(p.cost, p.quality) for p in panel.series["p"]] == [(25, 4), (20, 8)]
    assert [p.front for p in panel.series["p"]] == [True, True]
    assert [p.front for p in panel.series["random"]] == [True, False]
    assert panel.full.cost == 10
