"""Every block of code on every page runs, on a tiny model; and what pages name is there."""

from __future__ import annotations

import re
from pydoc_data.topics import topics

import pytest
from pages import ROOT, blocks, pages

import chatty
import headwise
from documented import KNOWN, RUN, run
from headwise.cli.main import app
from headwise.policies import registry

# Pages that explain, and need what was trained for the default model, or that talk to it; they go on from the tutorial.
TALK = [f"docs/{name}.md" for name in ("gate", "less", "long", "matching", "quantization", "steering", "how-to/turns")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    chatty.save(path, positions=8192)
    return path


@pytest.mark.parametrize("page", [p for p in pages() if any(b.language in RUN for b in blocks(p)) and p not in TALK])
def test_the_code_on_a_page_runs(page, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HEADWISE_MODEL", str(folder))
    monkeypatch.chdir(tmp_path)
    # A policy of a page is forgotten with it.
    monkeypatch.setattr(registry, "_POLICIES", dict(registry._POLICIES))
    (tmp_path / "report.txt").write_text(topics["debugger"][:4000], encoding="utf-8")
    run(page)


@pytest.mark.model
@pytest.mark.parametrize("page", TALK)
def test_the_code_on_a_page_runs_on_the_default_model(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = headwise.load_default_model()
    run(page, headwise=headwise, model=model, tokenizer=tokenizer)


@pytest.mark.parametrize("page", pages())
def test_every_block_says_what_it_is(page):
    assert {block.language for block in blocks(page)} <= set(KNOWN)


@pytest.mark.parametrize("page", pages())
def test_links_lead_to_files(page):
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        assert "://" in target or ((ROOT / page).parent / target).exists(), f"{page}: {target}"


def test_every_command_is_named_in_the_readme_or_a_how_to():
    text = "".join((ROOT / page).read_text(encoding="utf-8") for page in pages() if "results" not in page)
    names = [each.name or each.callback.__name__ for each in app.registered_commands]
    assert [name for name in names if f"headwise {name.replace('_', '-')}" not in text] == []
