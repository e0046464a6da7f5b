"""Prefills with everything that can be looked at in a prompt, and contenders that fail in any way."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from benching import ROUNDS, TINY, a_plan

from headwise.bench import prefill, run
from headwise.bench.contenders import auto, full, stock, with_graph
from headwise.bench.models import random_model
from headwise.bench.plan import Configuration
from headwise.bench.record import EXACT, GATES, Record
from headwise.policies import Auto, StreamingLLM


class Broken(StreamingLLM):
    """Fails in a way of its own."""

    def choose(self, layers):
        raise RuntimeError("broken")


@pytest.fixture(scope="module")
def made():
    return run.BenchModel(random_model(TINY, torch.float32, torch.device("cpu")), None, TINY)


def ran(made, plan):
    record = Record()
    run.run(plan, "tiny", lambda _: made, None, record, lambda _: None)
    return record


def plain_plan(*contenders, **options):
    return replace(a_plan(Configuration(1, 24, torch.float32, (stock(), *contenders), 1)), **options)


def test_prefills_are_measured_where_they_are_asked_for(made):
    assert ran(made, plain_plan()).prefills is None
    costs = ran(made, plain_plan(prefill_context=40)).prefills
    assert costs.context == 40 and costs.dtype == "float32"
    assert EXACT in costs.looks and len(costs.looks) == len(prefill._LOOKS)
    # The turn that warms up does not count.
    assert {len(seconds) for seconds in (costs.stock, *costs.looks.values())} == {ROUNDS}
    assert not costs.failures


def test_a_look_that_fails_costs_no_other_where_that_is_wanted(made, monkeypatch):
    monkeypatch.setitem(prefill._LOOKS, "nothing", Broken(0.5, 4))
    with pytest.raises(RuntimeError, match="broken"):
        ran(made, plain_plan(prefill_context=40))
    costs = ran(made, plain_plan(prefill_context=40, keep_going=True)).prefills
    assert costs.failures == {"nothing": "RuntimeError: broken"}
    assert len(costs.looks) == len(prefill._LOOKS) - 1


def test_a_look_that_the_model_cannot_be_served_with_is_named(made, monkeypatch):
    """There are no gates for most models, and the others are compared all the same."""
    monkeypatch.setitem(prefill._LOOKS, GATES, Auto(ratio=0.25, gate=True))
    costs = ran(made, plain_plan(prefill_context=40)).prefills
    assert list(costs.failures) == [GATES]
    assert "headwise train-gate" in costs.failures[GATES]
    assert len(costs.looks) == len(prefill._LOOKS) - 1


def test_a_contender_that_the_model_cannot_be_served_with_is_named_too(made):
    ours = ran(made, plain_plan(auto(0.25), full())).results[0].measurements
    assert "headwise train-gate" in ours[1].failure
    assert ours[2].failure is None and len(ours[2].round_seconds) == ROUNDS


def test_steps_are_captured_as_the_plan_says(made):
    captured = []

    def capture(step):
        captured.append(step)
        return step

    record = ran(made, plain_plan(with_graph(full()), capture=capture))
    assert captured
    assert [measurement.failure for measurement in record.results[0].measurements] == [None, None]


def test_whatever_fails_is_noted_where_that_is_wanted(made):
    graph = with_graph(full())
    with pytest.raises(ZeroDivisionError):
        ran(made, plain_plan(graph, capture=lambda step: 1 / 0))
    record = ran(made, plain_plan(graph, capture=lambda step: 1 / 0, keep_going=True))
    stocks, ours = record.results[0].measurements
    assert stocks.failure is None and len(stocks.round_seconds) == ROUNDS
    assert ours.failure == "ZeroDivisionError: division by zero"
