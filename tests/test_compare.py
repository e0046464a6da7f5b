"""Comparisons: policies at many sizes, speed in turn, curves, maps, one page, and the document of all records."""

from __future__ import annotations

import base64
import contextlib
import io
import json
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import matplotlib.image
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import chatty
import models
from headwise import AdaKV, FastGen, HeadwiseCache, Random, SnapKV, Window
from headwise.cli.main import main
from headwise.errors import ConfigurationError, InputError, UnknownPolicyError
from headwise.eval import speed
from headwise.eval.budgets import SizedPolicy, at_budgets, split_specs
from headwise.eval.cache_kinds import FULL_CACHE, PolicyCache
from headwise.eval.compare.curves import spread
from headwise.eval.compare.maps import kept_shares, save_rule_maps, save_share_maps
from headwise.eval.compare.page import write_comparison
from headwise.eval.compare.points import bytes_panels, pareto_front, speed_panels
from headwise.eval.compare.published import publish, render_records
from headwise.eval.compare.tasks import Workload, make_tasks
from headwise.eval.contenders import make_contenders
from headwise.eval.executor import Job, measure
from headwise.eval.fidelity import Fidelity
from headwise.eval.kept import describe_kept, rebuild_report
from headwise.eval.run_folder import RESULTS, write_json
from headwise.eval.speed import Speed
from headwise.eval.tables import make_grids
from headwise.eval.task import Subject

DOCS = Path(__file__).parent.parent / "docs"
POLICIES = ("snapkv:window=4", "fastgen:recovery=0.6")
SMALL = ("--context", 60, "--steps", 4, "--items", 2, "--new-tokens", 1, "--rounds", 1, "--evict-every", 2)
BUDGET = 6 * 1024


def call(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    return left.value.code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return chatty.save(tmp_path_factory.mktemp("model"), 1024)


@pytest.fixture(scope="module")
def command(folder):
    asked = ("--policies", ",".join(POLICIES), "--budgets", "0.5,6KiB", "--tasks", "fidelity,single-needle")
    return ("compare", "--model", folder, *asked, *SMALL)


@pytest.fixture(scope="module")
def compared(command, tmp_path_factory):
    """The folder of one run that several tests look at."""
    out = tmp_path_factory.mktemp("run") / "out"
    with models.unchecked_shapes():
        code, _, err = call(*command, "--out", out)
    assert code == 0, err
    return out


@pytest.fixture
def results(compared):
    return json.loads((compared / RESULTS).read_text())


@pytest.fixture(scope="module")
def subject():
    return Subject(chatty.model(1024), chatty.tokenizer(), {"evict_every": 2})


# Budgets.


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


plain = Fidelity.measure


def test_bytes_are_a_bound_that_is_nearly_reached(results):
    for summary in results["summaries"]:
        rows = {row["policy"]: row for row in summary["rows"]}
        # A token of two layers and heads: keys and values of eight numbers, and the column.
        token = 2 * 2 * (2 * 8 * 4 + 4)
        assert rows[f"{POLICIES[0]} at 6KiB"]["used_bytes"] == BUDGET // token * token


# Tasks.


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


# Speed.


def test_speed_is_that_of_rounds_in_turn_after_one_to_warm_up(subject, monkeypatch):
    task = Speed(context=30, steps=3, passages=1, rounds=3)
    (item,) = task.items(subject.tokenizer)
    reference = task.reference(subject, item)
    # By round, the first of which does not count: the full cache, and ours.
    taken = {"full": iter([9.0, 2.0, 6.0, 4.0]), "ours": iter([9.0, 1.0, 2.0, 4.0])}
    turns, fed = [], []

    def decode(subject, cache, ids):
        name = "full" if cache is reference.cache else "ours"
        turns.append(name)
        fed.append(ids[0].tolist())
        real(subject, cache, ids)
        return next(taken[name])

    real = speed._decode
    monkeypatch.setattr(speed, "_decode", decode)
    outcome = task.measure(subject, item, PolicyCache(Window(9)), reference)
    assert outcome.metrics == {"tokens_per_second": 2 / 2, "speedup": 2.0}
    assert turns == ["full", "ours", "ours", "full"] * 2
    text = item.data["ids"][30:33]
    assert [token for ids in fed[::2] for token in ids] == (text * 3)[:8]
    assert reference.cache.get_seq_length() == 30
    assert outcome.kept_ratio == pytest.approx(0.3)
    assert outcome.details["kept"]["layers"][0]["kept_tokens"] == [9, 9]


def test_speed_of_a_real_clock(subject):
    task = Speed(context=30, steps=3, passages=1, rounds=2)
    (item,) = task.items(subject.tokenizer)
    outcome = task.measure(subject, item, FULL_CACHE, task.reference(subject, item))
    ours, full = outcome.details["rounds"], outcome.details["full_rounds"]
    assert len(ours) == len(full) == 2
    assert outcome.metrics["tokens_per_second"] == pytest.approx((2 / ours[0] + 2 / ours[1]) / 2)
    assert outcome.metrics["speedup"] == pytest.approx((full[0] / ours[0] + full[1] / ours[1]) / 2)


# What every head keeps.


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_what_is_kept_survives_json(family):
    model = models.shared(family)
    cache = HeadwiseCache(model, FastGen(0.5, ladder=("local", "full")))
    models.generate(model, models.prompt(), cache, max_new_tokens=1)
    report = cache.report()
    told = json.loads(json.dumps(describe_kept(report)))
    again = rebuild_report(told)
    assert describe_kept(again) == told
    for name in ("used_bytes", "allocated_bytes", "full_bytes", "kept_ratio", "rule_counts", "policy", "seen_tokens"):
        assert getattr(again, name) == getattr(report, name), name


def unit(policy, kept, seen=10, **more):
    layers = [{"kept_tokens": tokens, "rules": tokens and [0] * len(tokens)} for tokens in kept]
    sizes = {"used_bytes": 4, "allocated_bytes": 4, "full_bytes": 8}
    told = {"policy": "P()", "seen_tokens": seen, "transcript_bytes": 0, "rungs": ["a"]}
    told["layers"] = [layer | sizes for layer in layers]
    return {"task": "speed", "policy": policy, "kept_ratio": 0.5, "details": {"kept": told}} | more


def test_shares_are_means_over_passages():
    units = [unit("p", [[2, 4], None]), unit("p", [[12, 8], None], seen=20), unit("p", [[9, 9], None], task="other")]
    found = kept_shares({"units": units})
    assert list(found) == ["p"]
    np.testing.assert_allclose(found["p"], [[0.4, 0.4], [np.nan, np.nan]])


def test_maps_show_the_shares_in_their_places(tmp_path):
    lineup = [{"label": f"p at {size}", "series": "p"} for size in (1, 2)]
    units = [unit("p at 1", [[10, 10], [10, 10]], kept_ratio=1.0), unit("p at 2", [[0, 0], [0, 0]], kept_ratio=0.0)]
    told = {"configuration": {"lineup": lineup}, "units": units}
    assert save_share_maps(told, tmp_path / "kept.png")
    image = matplotlib.image.imread(tmp_path / "kept.png")[..., :3]
    # The ends of the scale: dark blue where nothing is kept, yellow where all is; the smaller size comes first.
    columns = [
        np.argwhere(np.abs(image - colour).max(-1) < 0.02)[:, 1] for colour in ((0, 0.135, 0.305), (0.996, 0.91, 0.22))
    ]
    assert len(columns[0]) > 5000
    assert len(columns[1]) > 5000
    assert np.median(columns[0]) < np.median(columns[1])
    assert not save_share_maps({"configuration": {"lineup": []}, "units": []}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    assert save_rule_maps(told, tmp_path) == {}


# Points.


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


# The page.


def parsed(page):
    """The page as XML: whatever is not closed or not escaped is an error."""
    return ElementTree.fromstring(page.read_text(encoding="utf-8"))


def test_the_page_has_every_row_and_number(compared, results):
    body = parsed(compared / "compare.html").find("body")
    tables = body.findall("div/table")
    grids = make_grids(results["summaries"])
    assert len(grids) == 3
    assert [[[cell.text or "" for cell in row] for row in table.iter("tr")] for table in tables] == [
        [grid.columns, *grid.rows] for grid in grids
    ]
    assert all(len(grid.rows) == 1 + 2 * 3 for grid in grids)
    titles = [title.text for title in body.iter("h2")]
    assert [grid.title for grid in grids] == titles[-4:-1]
    said = {row[0].text: row[1].text for row in body.find("table").iter("tr")}
    assert {"model", "machine", "versions", "seed", "command", "fidelity"} <= set(said)
    assert "context 60" in said["fidelity"]
    appendix = json.loads(body.find("pre").text)
    assert appendix == {name: results[name] for name in appendix}
    assert appendix["inputs"]["fidelity"]["sha256"]


def test_the_page_needs_nothing_else(compared):
    root = parsed(compared / "compare.html")
    pictures = [base64.b64decode(image.get("src").removeprefix("data:image/png;base64,")) for image in root.iter("img")]
    files = {path.read_bytes() for path in compared.glob("*.png")}
    assert set(pictures) == files
    assert len(pictures) == 3 + 1
    assert {image.get("alt") is not None for image in root.iter("img")} == {True}
    assert not any(root.iter(tag) and list(root.iter(tag)) for tag in ("link", "script", "iframe"))
    assert not any(element.get("href") for element in root.iter())
    assert "url(" not in root.find("head/style").text
    for path in compared.glob("*.png"):
        image = matplotlib.image.imread(path)
        assert image.shape[0] > 200
        assert image[..., :3].std() > 0.01


def test_words_of_others_are_escaped(results, tmp_path):
    results["model"]["name"] = "<script>&\"'"
    for entry in [*results["configuration"]["lineup"], *results["units"]]:
        for name in {"label", "policy", "series"} & set(entry):
            if isinstance(entry[name], str):
                entry[name] = entry[name].replace("=4 at", "<i> at")
    for row in (row for summary in results["summaries"] for row in summary["rows"]):
        row["policy"] = row["policy"].replace("=4 at", "<i> at")
    page, *_ = write_comparison(results, tmp_path)
    body = parsed(page).find("body")
    assert body.find("h1").text == "headwise compare: <script>&\"'"
    assert "snapkv:window<i> at 0.5" in {cell.text for cell in body.iter("td")}


def test_interrupted_run_has_a_page_and_is_continued(command, compared, tmp_path, monkeypatch):
    calls = []

    def stop(*given):
        calls.append(given)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return plain(*given)

    # Pictures take longer than everything else.
    monkeypatch.setattr("headwise.eval.compare.page._draw", lambda results, folder: [])
    monkeypatch.setattr(Fidelity, "measure", stop)
    command = (*command, "--out", tmp_path / "out")
    with models.unchecked_shapes():
        code, _, err = call(*command)
    assert code == 130
    assert "--resume" in err
    told = {row[0].text for row in parsed(tmp_path / "out" / "compare.html").find("body/table").iter("tr")}
    assert "interrupted" in told
    with models.unchecked_shapes():
        code, _, err = call(*command, "--resume")
    assert code == 0, err
    first, second = (json.loads((path / RESULTS).read_text())["summaries"][1] for path in (compared, tmp_path / "out"))
    assert [(row["policy"], row["metrics"]) for row in first["rows"]] == [
        (row["policy"], row["metrics"]) for row in second["rows"]
    ]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--tasks", "nothing"), "unknown task 'nothing'"),
        (("--budgets", "x"), "a budget in bytes is a number"),
        (("--policies", "snapvk"), "unknown policy 'snapvk'"),
    ],
)
def test_bad_input_takes_one_line(tmp_path, arguments, says):
    code, out, err = call("compare", "--out", tmp_path / "out", *arguments)
    assert (code, out) == (2, "")
    assert says in err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


# The document.


def test_published_records_lack_the_details_only(compared, results, tmp_path):
    target = publish(compared, "small", tmp_path / "records")
    record = json.loads(target.read_text())
    assert target.stat().st_size < (compared / RESULTS).stat().st_size
    assert all("details" not in each for each in record["units"])
    assert [each["metrics"] for each in record["units"]] == [each["metrics"] for each in results["units"]]
    assert {**record, "units": 0} == {**results, "units": 0}


def test_document_has_every_table_and_what_it_was_measured_on(compared, results, tmp_path):
    publish(compared, "b", tmp_path)
    publish(compared, "a", tmp_path)
    code, out, err = call("results", tmp_path)
    assert code == 0, err
    assert out.index("## a\n") < out.index("## b\n")
    lines = out.splitlines()
    for grid in make_grids(results["summaries"]):
        assert lines.count(f"### {grid.title}") == 2
        assert lines.count("| " + " | ".join(column.replace("\n", "<br>") for column in grid.columns) + " |") == 2
        for row in grid.rows:
            assert "| " + " | ".join(row) + " |" in lines
    for word in ("float32", results["versions"]["torch"], results["machine"]["processor"], "context 60", "2 items"):
        assert word in out
    assert "- command: `headwise compare --model " in out
    assert call("results", tmp_path, "--out", tmp_path / "all.md") == (0, "", "")
    assert (tmp_path / "all.md").read_text() == out
    code, again, err = call("results", tmp_path, "--add", f"c={compared}")
    assert code == 0, err
    assert "## c\n" in again


def test_bars_and_brackets_do_not_break_a_table(results, tmp_path):
    for row in results["summaries"][0]["rows"][:1]:
        row["policy"] = "a|<b>"
    write_json(tmp_path / "x.json", results)
    assert r"| a\|&lt;b&gt; |" in render_records(tmp_path)


@pytest.mark.parametrize(
    ("files", "says"),
    [({}, "no records"), ({"a.json": "{"}, "not the record of a run"), ({"a.json": '{"model": 1}'}, "not the record")],
)
def test_records_that_cannot_be_rendered(tmp_path, files, says):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=says):
        render_records(tmp_path)


@pytest.mark.parametrize("word", ["x", "=dir", "a/b=dir", "x="])
def test_bad_add(tmp_path, word):
    code, _, err = call("results", tmp_path, "--add", word)
    assert code == 2
    assert "--add takes NAME=DIR" in err


def test_the_committed_document_is_what_the_records_say():
    records, document = sorted((DOCS / "results").glob("*.json")), DOCS / "results.md"
    assert document.exists() == bool(records)
    if records:
        assert document.read_text(encoding="utf-8") == render_records(DOCS / "results")
