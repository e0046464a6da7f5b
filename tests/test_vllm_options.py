"""What a request of vLLM says, and rows in whole pages; without vLLM."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import headwise
from headwise.hosts.vllm.choice import (
    PromptBlocks,
    query_rows,
)
from headwise.hosts.vllm.options import Options, options_of
from headwise.hosts.vllm.whole_pages import pages_of_heads, rows_in_pages
from headwise.policies import AdaKV, SnapKV, StreamingLLM


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (None, None),
        ({}, None),
        ({"other": 3}, None),
        ({"headwise": "off"}, None),
        ({"headwise": False}, None),
        ({"headwise": {}}, Options()),
        ({"headwise": {"policy": "snapkv:window=16", "ratio": 0.5}}, Options("snapkv:window=16", 0.5)),
        ({"headwise_policy": "keydiff"}, Options("keydiff")),
        ({"headwise_ratio": 1}, Options(ratio=1)),
        ({"headwise_policy": "tova", "headwise_ratio": 0.1, "other": 1}, Options("tova", 0.1)),
    ],
)
def test_what_a_request_says(said, expected):
    assert options_of(said) == expected


def test_what_holds_for_all_is_changed_by_a_request():
    default = Options("keydiff", 0.5)
    assert options_of(None, default) == options_of({"other": 1}, default) == default
    assert options_of({"headwise": "off"}, default) is None
    assert options_of({"headwise_ratio": 0.1}, default) == Options("keydiff", 0.1)
    assert options_of({"headwise": {"policy": "tova"}}, default) == Options("tova", 0.5)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"headwise": "on"}, "is an object such as"),
        ({"headwise": 0.25}, "is an object such as"),
        ({"headwise": {"ratios": 0.25}}, "has no 'ratios'"),
        ({"headwise_keep": 3}, "has no 'headwise_keep'"),
        ({"headwise": {"ratio": 0.5}, "headwise_ratio": 0.5}, "not both"),
        *(
            ({"headwise": {"ratio": bad}}, "ratio must be above 0")
            for bad in (0, -1, 1.5, "0.5", True, None, float("nan"))
        ),
        ({"headwise": {"policy": 3}}, "policy must be a text"),
        ({"headwise": {"policy": "snapkw"}}, "did you mean snapkv"),
        ({"headwise": {"policy": "snapkv:windows=3"}}, "has no parameter 'windows'"),
        ({"headwise": {"policy": "snapkv+int8"}}, "and nothing beside"),
        ({"headwise": {"policy": "snapkv+match"}}, "and nothing beside"),
        ({"headwise": {"policy": "fastgen:recovery=0.9"}}, "is said by headwise_ratio; leave recovery out"),
        ({"headwise": {"policy": "fastgen:local=8,keep=0.5"}}, "leave keep out"),
        ({"headwise": {"policy": "snapkv:keep=64"}}, "leave keep out"),
        ({"headwise": {"policy": "h2o:recent=0.5"}}, "leave recent out"),
        ({"headwise": {"policy": "auto"}}, "in fewer bits"),
        ({"headwise": {"policy": "auto:gate=true"}}, "in fewer bits"),
        ({"headwise": {"policy": "kvzip"}}, "would have to repeat the prompt"),
        ({"headwise": {"policy": "kvzip:gate=some/folder"}}, "the folder it was started with"),
        ({"headwise": {"policy": "punctuation"}}, "has no budget"),
        ({"headwise": {"policy": "full"}}, "has no budget"),
        ({"headwise": {"policy": "expected-attention:future=2000000"}}, "future is above 65,536"),
        ({"headwise": {"policy": "snapkv:window=1000000000"}}, "window is above 65,536"),
    ],
)
def test_what_cannot_be_is_refused(said, why):
    with pytest.raises(headwise.ConfigurationError, match=why):
        options_of(said)


def test_policies_have_so_many_rows_and_choose_once():
    assert Options("adakv:over=snapkv").keeping(96) == AdaKV(96, "snapkv", of="prompt")
    assert Options("snapkv:window=16").keeping(96) == SnapKV(96, window=16, of="prompt")
    assert Options("streamingllm").keeping(96) == StreamingLLM(96, within=True, of="prompt")
    assert [query_rows(Options(each)) for each in ("snapkv:window=9", "keydiff", "streamingllm", "tova")] == [
        9,
        0,
        0,
        1,
    ]
    assert query_rows(Options("expected-attention")) is None


@pytest.mark.parametrize(
    ("tokens", "ratio", "whole", "stay"),
    [(0, 0.5, 0, 0), (31, 0.5, 0, 0), (32, 0.5, 1, 1), (1000, 0.25, 31, 8), (3200, 0.07, 100, 7), (96, 1, 3, 3)],
)
def test_blocks_of_a_prompt(tokens, ratio, whole, stay):
    blocks = PromptBlocks.of(Options(ratio=ratio), tokens, 32)
    assert (blocks.whole, blocks.stay) == (whole, stay)
    assert blocks.candidates == 32 * whole and blocks.rows == tokens - 32 * (whole - stay)


def test_pages_by_the_largest_remainder():
    assert pages_of_heads(torch.tensor([50, 30, 20]), 10, 10).tolist() == [5, 3, 2]
    # What one cannot fill goes to the others, as they need it.
    assert pages_of_heads(torch.tensor([600, 40, 20, 0]), 20, 9).tolist() == [9, 7, 3, 1]
    # Shares 4.4, 2.4, 1.2: the page that is left goes to one of the two with most left over.
    assert sorted(pages_of_heads(torch.tensor([55, 30, 15]), 8, 10).tolist()) in ([1, 2, 5], [1, 3, 4])
    # A head has one page at least, and not more than it can fill.
    assert pages_of_heads(torch.tensor([100, 0, 0]), 6, 4).tolist() == [4, 1, 1]
    assert pages_of_heads(torch.tensor([100, 0, 0]), 3, 9).tolist() == [1, 1, 1]
    assert pages_of_heads(torch.tensor([0, 0]), 4, 3).tolist() == [2, 2]


def test_many_pages_are_given_at_once():
    kept = torch.randint(1, 9, (512,))
    kept[:9] = 32_768
    started = time.perf_counter()
    found = pages_of_heads(kept, 512 * 256, 1024)
    assert int(found.sum()) == 512 * 256 and bool((found[:9] == 1024).all())
    assert time.perf_counter() - started < 3


@given(st.lists(st.integers(0, 500), min_size=1, max_size=9), st.integers(1, 12), st.floats(0.01, 1))
def test_pages_are_as_many_as_there_are(kept, most, ratio):
    pages = max(1, round(ratio * most)) * len(kept)
    found = pages_of_heads(torch.tensor(kept), pages, most)
    assert int(found.sum()) == pages and bool((found >= 1).all()) and bool((found <= most).all())


def test_rows_in_pages():
    keep = torch.tensor([[1, 0, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]], dtype=torch.bool)
    score = torch.tensor([[0.0, 5, 1, 4, 6, 2], [9, 1, 5, 2, 4, 3], [1, 2, 3, 4, 5, 6]])
    found = rows_in_pages(keep, score, torch.tensor([2, 1, 1]), 2)
    # Kept ones first though others are worth more; of too many the best; where nothing is kept the best of all.
    assert [each.tolist() for each in found] == [[0, 1, 2, 4], [2, 4], [4, 5]]
    newest = rows_in_pages(keep, None, torch.tensor([2, 1, 1]), 2)
    assert [each.tolist() for each in newest] == [[0, 2, 4, 5], [4, 5], [4, 5]]
