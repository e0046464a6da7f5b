"""What makes the first minutes easy: a policy in words, the nearest name in an error, a report in a notebook."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
import torch

import headwise
import tiny
from commands import assert_one_line
from headwise.errors import ConfigurationError, UnknownPolicyError, or_nearest


def read(cache, model, count=60):
    with torch.no_grad():
        model(tiny.prompt(count), past_key_values=cache)
    return cache


def test_a_cache_takes_a_policy_in_words(tmp_path):
    model = tiny.llama()
    cache = read(headwise.HeadwiseCache(model, "snapkv:keep=0.25,window=4+int8"), model)
    assert cache.policy == headwise.Quantized(headwise.SnapKV(keep=0.25, window=4), 8)
    cache.save(tmp_path / "saved.safetensors")
    again = headwise.HeadwiseCache.load(tmp_path / "saved.safetensors", model, "snapkv:keep=0.25,window=4+int8")
    assert again.report().used_bytes == cache.report().used_bytes and again.policy == cache.policy
    # The budget is its size.
    assert headwise.HeadwiseCache(model, "snapkv", budget=12).policy == headwise.SnapKV(keep=12)


@pytest.mark.parametrize(
    ("words", "error", "says"),
    [
        ("snapk:keep=0.25", UnknownPolicyError, "did you mean snapkv"),
        ("snapkv:kepe=0.25", ConfigurationError, "has no parameter 'kepe'.*did you mean 'keep'"),
        ("snapkv", ConfigurationError, "needs"),
        ("", UnknownPolicyError, "unknown policy ''"),
    ],
)
def test_words_that_are_none_are_refused(words, error, says):
    with pytest.raises(error, match=says):
        headwise.HeadwiseCache(tiny.llama(), words)


def test_the_command_line_takes_the_same_words(headwise_command):
    words = ("generate", "--prompt", "Who?", "--max-new-tokens", 2, "--json")
    one = headwise_command(*words, "--policy", "snapkv:keep=0.25,window=4").json
    other = headwise_command(*words, "--policy", "snapkv", "--set", "keep=0.25", "--set", "window=4").json
    assert one["policy"] == other["policy"] and one["text"] == other["text"]
    both = headwise_command(*words, "--policy", "snapkv:keep=0.25", "--set", "window=4")
    assert_one_line(both, "--set and --recovery go with a name")


@pytest.fixture
def headwise_command(tmp_path, monkeypatch):
    import chatty
    import commands

    monkeypatch.setenv("HEADWISE_MODEL", str(tmp_path))
    chatty.save(tmp_path)
    return commands.call


@pytest.mark.parametrize(
    ("name", "expected"),
    [("cppu", "; did you mean 'cpu'?"), ("cpu", "; did you mean 'cpu'?"), ("abacus", ""), ("", ""), (None, "")],
)
def test_the_nearest_name_is_told_where_one_is_near(name, expected):
    assert or_nearest(name, ("auto", "cpu", "triton")) == expected


class _Cells(HTMLParser):
    """The words in every cell of a table."""

    def __init__(self):
        super().__init__()
        self.cells = []

    def handle_starttag(self, tag, attributes):
        if tag == "td":
            self.cells.append("")

    def handle_data(self, data):
        self.cells[-1] += data


@pytest.mark.parametrize("policy", ["fastgen", "auto:ratio=0.3"])
def test_a_report_in_a_notebook_says_what_it_prints(policy):
    model = tiny.llama()
    report = read(headwise.HeadwiseCache(model, policy, tokenizer=tiny.tokenizer()), model).report()
    table = _Cells()
    table.feed(report._repr_html_())
    pairs = list(zip(table.cells[::2], table.cells[1::2], strict=True))
    assert pairs == [(name.strip(), value) for name, value in report.lines()] and len(pairs) > 8
    printed = [re.split(r" {2,}", line.strip(), maxsplit=1) for line in str(report).splitlines()]
    assert [tuple(pair) for pair in printed] == pairs
    share = float(re.search(r"width:([0-9.]+)%", report._repr_html_()).group(1))
    assert share == pytest.approx(min(100, 100 * report.allocated_bytes / report.full_bytes), abs=0.06)


def test_a_report_of_nothing_can_be_shown():
    model = tiny.llama()
    empty = headwise.HeadwiseCache(model, "full").report()
    assert "width:0.0%" in empty._repr_html_() and "<script" not in empty._repr_html_()
