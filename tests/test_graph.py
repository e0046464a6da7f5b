"""A captured decode step gives what plain steps give, and asks the host nothing.

There is no GPU here, so the step is traced instead of captured: what is replayed is the list of operations of one
step on the same tensors, as a CUDA graph replays its launches. A number that the host put into it would stay.
"""

from __future__ import annotations

import pytest
import torch

import headwise
import models
import tiny
from captured_steps import NeverWaits, traced
from headwise.hosts.transformers.graph import DecodeGraph
from oracle import rows_of

POLICIES = [
    headwise.Full(),
    headwise.StreamingLLM(window=9, sinks=3),
    headwise.H2O(heavy=5, recent=4),
    headwise.FastGen(0.6),
    headwise.Random(keep=0.5, seed=3),
    headwise.Match(headwise.SnapKV(keep=9, window=4)),
]


def caches(model, policy, **options):
    return [
        headwise.HeadwiseCache(model, policy, tokenizer=tiny.tokenizer(), kernel="reference", **options)
        for _ in range(2)
    ]


def prefill(model, cache, ids, mask):
    with torch.no_grad():
        at = (mask.cumsum(1) - 1).clamp(min=0)
        return model(input_ids=ids, attention_mask=mask, position_ids=at, past_key_values=cache).logits[:, -1]


@pytest.mark.parametrize("evict_every", [1, 4])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_replayed_step_equals_a_plain_one(policy, evict_every):
    model = tiny.llama()
    ids, mask = tiny.left_padded(tiny.prompt(23, seed=1)[0], tiny.prompt(37, seed=2)[0])
    plain, graphed = caches(model, policy, evict_every=evict_every, page_size=4)
    tokens = [prefill(model, cache, ids, mask).argmax(-1)[:, None] for cache in (plain, graphed)]
    assert torch.equal(*tokens)
    further = tiny.prompt(19, seed=3, batch=2)
    with DecodeGraph(model, graphed, room=7, capture=traced) as graph, torch.no_grad():
        for step in range(19):
            new = further[:, step : step + 1]
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
            at = mask.sum(1, keepdim=True) - 1
            expected = model(input_ids=new, attention_mask=mask, position_ids=at, past_key_values=plain).logits[:, -1]
            torch.testing.assert_close(graph.step(new), expected, atol=1e-5, rtol=1e-5)
            for one, other in zip(plain.headwise_layers, graphed.headwise_layers, strict=True):
                assert rows_of(one.core) == rows_of(other.core)
    assert graphed.get_seq_length() == plain.get_seq_length()
    # Afterwards it is a cache like any other.
    mask = torch.cat([mask, torch.ones(2, 3, dtype=torch.long)], 1)
    at = (mask.cumsum(1) - 1)[:, -3:]
    with torch.no_grad():
        one, other = (
            model(input_ids=further[:, :3], attention_mask=mask, position_ids=at, past_key_values=cache).logits
            for cache in (plain, graphed)
        )
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernel", ["reference", "cpu"])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_plain_step_does_not_wait_between_evictions(policy, kernel):
    model, ids = tiny.llama(), tiny.prompt(30)
    cache = headwise.HeadwiseCache(model, policy, tokenizer=tiny.tokenizer(), kernel=kernel)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
        # When the prompt's last page is full, pages are taken for the 16 tokens that follow.
        for _ in range(9):
            model(input_ids=ids[:, :1], past_key_values=cache)
        with NeverWaits():
            for step in range(9, 15):
                at = torch.full((1, 1), 30 + step)
                model(input_ids=ids[:, :1], position_ids=at, past_key_values=cache)


def test_the_step_to_capture_never_waits():
    model, ids = tiny.llama(), tiny.prompt(30)
    cache, _ = caches(model, headwise.H2O(5, 4))
    prefill(model, cache, ids, torch.ones_like(ids))

    def watched(step):
        def replay():
            with NeverWaits():
                return step()

        return replay

    with DecodeGraph(model, cache, capture=watched) as graph:
        for token in range(3, 40):
            graph.step(torch.tensor([[token]]))
    assert cache.get_seq_length() == 67


def test_markers_of_a_policy_are_seen_in_captured_steps():
    policy = headwise.FastGen(recovery=0.0, local=4, ladder=("special+local", "full"))
    model = tiny.llama()
    plain, graphed = caches(model, policy, markers=["w31 w47"], evict_every=2)
    ids = tiny.prompt(11)
    for cache in (plain, graphed):
        prefill(model, cache, ids, torch.ones_like(ids))
    new = [31, 47, 50, 51, 0, 52, 53, 54, 55, 56]
    with DecodeGraph(model, graphed, capture=traced) as graph, torch.no_grad():
        for token in new:
            model(input_ids=torch.tensor([[token]]), past_key_values=plain)
            graph.step(torch.tensor([[token]]))
    assert rows_of(plain.headwise_layers[0].core) == rows_of(graphed.headwise_layers[0].core)
    assert {11, 12, 15} <= rows_of(graphed.headwise_layers[0].core)[0][0]


def test_what_cannot_be_captured_is_refused():
    model, ids = tiny.llama(), tiny.prompt(9)
    cache, _ = caches(model, headwise.Full())
    with pytest.raises(headwise.ConfigurationError, match="need a model on a GPU, this one is on cpu"):
        DecodeGraph(model, cache)
    with pytest.raises(headwise.CacheStateError, match="once the prompt is in"):
        DecodeGraph(model, cache, capture=traced)
    prefill(model, cache, ids, torch.ones_like(ids))
    with pytest.raises(headwise.ConfigurationError, match="room must be a count of 1 or more, got 0"):
        DecodeGraph(model, cache, capture=traced, room=0)
    graph = DecodeGraph(model, cache, capture=traced)
    with pytest.raises(headwise.InputError, match=r"ids of shape \(1, 1\), got \(2, 1\)"):
        graph.step(torch.zeros(2, 1, dtype=torch.long))
    sliding = models.shared("gemma3")
    with pytest.raises(headwise.UnsupportedModelError, match="every layer's cache is headwise's"):
        DecodeGraph(sliding, headwise.HeadwiseCache(sliding, headwise.Full()), capture=traced)
