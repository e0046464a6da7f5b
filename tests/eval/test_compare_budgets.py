"""Comparisons: policies at every budget, and tasks by name."""

from __future__ import annotations

import pytest

import chatty
from headwise import AdaKV, FastGen, Random, SnapKV, Window
from headwise.errors import ConfigurationError, UnknownPolicyError
from headwise.eval.budgets import SizedPolicy, at_budgets, split_specs
from headwise.eval.compare.tasks import Workload, make_tasks
from headwise.eval.contenders import make_contenders
from headwise.eval.executor import Job, measure
from headwise.eval.fidelity import Fidelity
from headwise.eval.task import Subject

pytestmark = pytest.mark.usefixtures("short_manual")


@pytest.fixture(scope="module")
def subject():
    return Subject(chatty.model(1024), chatty.tokenizer(), {"evict_every": 2})


def test_a_policy_without_a_size_is_there_at_every_budget():
    assert list(at_budgets("snapkv:window=4", ["0.5", " 12", "2KiB"])) == [
        SizedPolicy("snapkv:window=4", "snapkv:window=4 at 0.5", SnapKV(0.5, 4)),
        SizedPolicy("snapkv:window=4", "snapkv:window=4 at 12", SnapKV(12, 4)),
        SizedPolicy("snapkv:window=4", "snapkv:window=4 at 2KiB", SnapKV(1.0, 4), "2KiB"),
    ]
    assert [
        room.policy for spec in ("adakv", "fastgen", "window", "random") for room in at_budgets(spec, ["0.25"])
    ] == [
        AdaKV(0.25),
        FastGen(keep=0.25),
        Window(0.25),
        Random(0.25),
    ]


@pytest.mark.parametrize(
    "spec", ["snapkv:keep=0.3", "fastgen:recovery=0.9", "h2o:heavy=0.1,recent=0.2", "window:size=3", "full", "special"]
)
def test_a_policy_that_states_its_size_or_has_none_stays_as_it_is(spec):
    (room,) = at_budgets(spec, ["0.5", "0.25"])
    assert room.label == spec
    assert list(at_budgets(spec, [])) == [room]


@pytest.mark.parametrize(
    ("spec", "budget", "error", "says"),
    [
        ("snapkv", "1.5", ConfigurationError, "budget 1.5 must be a fraction"),
        ("snapkv", "64 MeB", ConfigurationError, "such as 64MiB"),
        ("snapvk", "0.5", UnknownPolicyError, "snapkv"),
        ("h2o:heavy=0.5", "0.5", ConfigurationError, "needs parameter recent"),
    ],
)
def test_bad_budgets(spec, budget, error, says):
    with pytest.raises(error, match=says):
        list(at_budgets(spec, [budget]))


def test_specs_with_commas_inside():
    text = "snapkv, h2o:heavy=0.1,recent=0.2,window:size=3"
    assert split_specs(text) == ["snapkv", "h2o:heavy=0.1,recent=0.2", "window:size=3"]


def test_contenders_are_the_product_and_random_stands_behind_each():
    made = make_contenders(["snapkv", "window", "fastgen:recovery=0.9"], budgets=["0.5", "9"])
    policies = [contender for contender in made if contender.twin_of is None]
    sizes = [f"{name} at {size}" for name in ("snapkv", "window") for size in ("0.5", "9")]
    assert [contender.label for contender in policies] == ["full", *sizes, "fastgen:recovery=0.9"]
    assert [each.twin_of for each in made if each.twin_of is not None] == [each.label for each in policies[1:]]
    assert [contender.series for contender in policies] == [
        "full",
        *["snapkv"] * 2,
        *["window"] * 2,
        "fastgen:recovery=0.9",
    ]
    with pytest.raises(ConfigurationError, match="'window:size=9' is given twice"):
        make_contenders(["window", "window:size=9"], budgets=["9"])


plain = Fidelity.measure


def test_what_keeps_as_much_has_the_same_random_eviction(subject, monkeypatch):
    seen = []
    monkeypatch.setattr(Fidelity, "measure", lambda *given: seen.append(given[3]) or plain(*given))
    task = Fidelity(context=40, steps=2, passages=1)
    job = Job(
        task, task.items(subject.tokenizer)[0], make_contenders(["window:size=10", "snapkv:keep=10,window=2"]), {}
    )
    units = list(measure(subject, job))
    assert [str(kind.policy) for kind in seen] == [
        *("Full()", "Window(size=10)", "Random(keep=0.25)", "SnapKV(keep=10, window=2)"),
    ]
    assert [unit.policy for unit in units] == [contender.label for contender in job.contenders]
    assert units[2].measured == units[4].measured


def test_tasks_by_name():
    def labels(*names):
        return [task.label for task in make_tasks(names, Workload(items=3, seed=5))]

    assert labels() == ["speed"]
    assert labels("fidelity", "recall-aware", "multi-key") == [
        "speed",
        "fidelity",
        "recall of 1 fact in 4, aware",
        "synthetic multi-key, agnostic",
        "synthetic multi-key, aware",
    ]
    assert len(labels("synthetic-agnostic")) == 1 + 6
    speed_task, fidelity = make_tasks(["fidelity"], Workload(context=50, steps=7, items=2))
    assert speed_task.items(chatty.tokenizer()) == fidelity.items(chatty.tokenizer())


@pytest.mark.parametrize(
    ("name", "says"),
    [("recal", "unknown task 'recal'; one of fidelity"), ("generation", "--prompts"), ("-aware", "-aw")],
)
def test_tasks_that_cannot_be(name, says):
    with pytest.raises(ConfigurationError, match=says):
        make_tasks([name], Workload())
