"""`headwise compare`: one page that needs nothing else, and the document of all records."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import matplotlib.image
import pytest

from commands import Answer, assert_one_line, call
from headwise.errors import InputError
from headwise.eval.compare.page import write_comparison
from headwise.eval.compare.published import publish, render_records
from headwise.eval.fidelity import Fidelity
from headwise.eval.run_folder import RESULTS, write_json
from headwise.eval.tables import make_grids

pytestmark = pytest.mark.usefixtures("short_manual")

DOCS = Path(__file__).parents[2] / "docs"

POLICIES = ("snapkv:window=4", "fastgen:recovery=0.6")

SMALL = ("--context", 60, "--steps", 4, "--items", 2, "--new-tokens", 1, "--rounds", 1, "--evict-every", 2)

BUDGET = 6 * 1024


@pytest.fixture(scope="module")
def command(folder):
    asked = ("--policies", ",".join(POLICIES), "--budgets", "0.5,6KiB", "--tasks", "fidelity,single-needle")
    return ("compare", "--model", folder, *asked, *SMALL)


@pytest.fixture(scope="module")
def compared(command, short_manual, tmp_path_factory):
    """The folder of one run that several tests look at."""
    out = tmp_path_factory.mktemp("run") / "out"
    answer = call(*command, "--out", out)
    assert answer.code == 0, answer.err
    return out


@pytest.fixture
def results(compared):
    return json.loads((compared / RESULTS).read_text())


def test_bytes_are_a_bound_that_is_nearly_reached(results):
    for summary in results["summaries"]:
        rows = {row["policy"]: row for row in summary["rows"]}
        # A token of two layers and heads: keys and values of eight numbers, and the column.
        token = 2 * 2 * (2 * 8 * 4 + 4)
        assert rows[f"{POLICIES[0]} at 6KiB"]["used_bytes"] == BUDGET // token * token


plain = Fidelity.measure


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


def test_words_of_others_are_escaped(results, tmp_path, monkeypatch):
    # Nobody looks at these pictures.
    for name in ("curves", "maps"):
        monkeypatch.setattr(f"headwise.eval.compare.{name}._DPI", 40)
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
    answer = call(*command)
    assert answer.code == 130
    assert "--resume" in answer.err
    told = {row[0].text for row in parsed(tmp_path / "out" / "compare.html").find("body/table").iter("tr")}
    assert "interrupted" in told
    answer = call(*command, "--resume")
    assert answer.code == 0, answer.err
    first, second = (json.loads((path / RESULTS).read_text())["summaries"][1] for path in (compared, tmp_path / "out"))
    assert [(row["policy"], row["metrics"]) for row in first["rows"]] == [
        (row["policy"], row["metrics"]) for row in second["rows"]
    ]


def test_heads_are_a_page_beside_it(command, tmp_path):
    answer = call(*command, "--heads", "--out", tmp_path / "out")
    assert answer.code == 0, answer.err
    (link,) = parsed(tmp_path / "out" / "compare.html").findall("body/p/a")
    text = (tmp_path / "out" / link.get("href")).read_text(encoding="utf-8")
    panels = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL).group(1))["panels"]
    assert [panel["policy"].partition("(")[0] for panel in panels] == ["SnapKV", "FastGen"]
    # At the first size, of the passage whose fidelity is measured.
    assert "keep=0.5" in panels[0]["policy"] and {panel["prompt"] for panel in panels} == {60}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--heads", "--server", "http://localhost:1"), "neither --ray nor --server"),
        (("--tasks", "nothing"), "unknown task 'nothing'"),
        (("--budgets", "x"), "a budget in bytes is a number"),
        (("--policies", "snapvk"), "unknown policy 'snapvk'"),
    ],
)
def test_bad_input_takes_one_line(tmp_path, arguments, says):
    assert_one_line(call("compare", "--out", tmp_path / "out", *arguments), says)
    assert not (tmp_path / "out").exists()


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
    answer = call("results", tmp_path)
    assert answer.code == 0, answer.err
    out = answer.out
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
    assert call("results", tmp_path, "--out", tmp_path / "all.md") == Answer(0, "", "")
    assert (tmp_path / "all.md").read_text() == out
    again = call("results", tmp_path, "--add", f"c={compared}")
    assert again.code == 0, again.err
    assert "## c\n" in again.out


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
    assert_one_line(call("results", tmp_path, "--add", word), "--add takes NAME=DIR")


def test_the_committed_document_is_what_the_records_say():
    records, document = sorted((DOCS / "results").glob("*.json")), DOCS / "results.md"
    assert document.exists() == bool(records)
    if records:
        assert document.read_text(encoding="utf-8") == render_records(DOCS / "results")
