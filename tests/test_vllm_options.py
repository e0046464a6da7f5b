"""What a request of vLLM says, and rows in whole pages; without vLLM."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import headwise
from headwise.hosts.vllm.choice import PromptBlocks, choose_rows, query_rows
from headwise.hosts.vllm.options import Options, options_of
from headwise.hosts.vllm.whole_pages import pages_of_heads, rows_in_pages
from headwise.policies import AdaKV, SnapKV, StreamingLLM
from headwise.types import LogitOptions

NAN = float("nan")
POLICIES = ("adakv:over=snapkv", "snapkv:window=5", "keydiff", "tova", "streamingllm", "keynorm")


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
        ({"headwise": {"policy": "pyramidkv"}}, "all layers of a request have the same blocks"),
        ({"headwise": {"policy": "fastgen"}}, "known only when the prompt was read"),
        ({"headwise": {"policy": "auto"}}, "cannot be served"),
        ({"headwise": {"policy": "kvzip"}}, "cannot be served"),
        ({"headwise": {"policy": "h2o"}}, "that vLLM's kernels do not give"),
        ({"headwise": {"policy": "punctuation"}}, "the kind of each token"),
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
    # Shares 4.4, 2.4, 1.2: the page that is left goes to one of the two with most left over.
    assert sorted(pages_of_heads(torch.tensor([55, 30, 15]), 8, 10).tolist()) in ([1, 2, 5], [1, 3, 4])
    # A head has one page at least, and not more than it can fill.
    assert pages_of_heads(torch.tensor([100, 0, 0]), 6, 4).tolist() == [4, 1, 1]
    assert pages_of_heads(torch.tensor([100, 0, 0]), 3, 9).tolist() == [1, 1, 1]
    assert pages_of_heads(torch.tensor([0, 0]), 4, 3).tolist() == [2, 2]


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


@pytest.mark.shapes
@pytest.mark.parametrize("words", POLICIES)
def test_rows_that_a_policy_chooses(words):
    """The best of the candidates, as the policy scores them, with what fills no block always kept."""
    torch.manual_seed(1)
    options, tokens, heads, size = Options(words, 0.4), 407, 3, 8
    blocks = PromptBlocks.of(options, tokens, size)
    queries, keys = torch.randn(1, heads, 2, tokens, 16), torch.randn(1, heads, tokens, 16)
    # A head that looks at few tokens, and others that look at all.
    keys[:, 0] *= 4
    values = torch.randn(1, heads, tokens, 16)
    rows = choose_rows(options, blocks, queries, keys, values, LogitOptions(0.25), None)
    assert sum(map(len, rows)) == blocks.stay * heads * size == 20 * 3 * 8
    assert all(len(own) % size == 0 and own.tolist() == sorted(set(own.tolist())) for own in rows)
    assert max(int(own.max()) for own in rows) < blocks.candidates == 400
    counts = {len(own) for own in rows}
    assert (len(counts) > 1) == words.startswith("adakv")
    if words == "streamingllm":
        assert all(own.tolist() == [*range(4), *range(400 - 156, 400)] for own in rows)
    if words == "keynorm":
        best = keys[0, :, :400].norm(dim=-1).argsort(dim=1)[:, :160].sort(dim=1).values
        assert [own.tolist() for own in rows] == best.tolist()
    if words == "tova":
        logits = (queries[0, :, :, -1:] @ keys[0, :, None].mT * 0.25).softmax(dim=-1)
        best = logits.mean(dim=(0, 1))[0, :400].argsort(descending=True)[:160].sort().values
        assert all(own.tolist() == best.tolist() for own in rows)
