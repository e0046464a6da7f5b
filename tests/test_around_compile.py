"""A model under `torch.compile`: the same logits as without, and steps that run what was compiled for the first."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo import trace_rules
from torch._dynamo.utils import counters

import headwise
import tiny
from cases import EVERYTHING

WARM, STEPS = 5, 12


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def in_place(model, backend):
    model.forward = torch.compile(model.forward, backend=backend)
    return model


def regional(model, backend):
    for layer in model.model.layers:
        in_place(layer.self_attn, backend)
    return model


def wrapped(model, backend):
    return torch.compile(model, backend=backend)


def play(model, cache):
    """Logits of a prompt and of single tokens; how many graphs there were before each."""
    ids, found, graphs = tiny.prompt(20 + WARM + STEPS), [], []
    with torch.no_grad():
        for step in (ids[:, :20], *ids[:, 20:].split(1, dim=1)):
            graphs.append(counters["stats"]["unique_graphs"])
            found.append(model(input_ids=step, past_key_values=cache).logits[:, -1])
    return torch.cat(found), [*graphs, counters["stats"]["unique_graphs"]]


CASES = {
    "attention": (regional, "eager", headwise.H2O(heavy=4, recent=5)),
    "forward": (in_place, "eager", headwise.H2O(heavy=4, recent=5)),
    "model": (wrapped, "aot_eager", headwise.Full()),
}


@pytest.mark.skipif(not EVERYTHING, reason="compiling takes ten seconds, whoever's cache it is for")
@pytest.mark.parametrize("case", CASES)
def test_a_compiled_model_gives_the_same_and_compiles_no_step_anew(case):
    way, backend, policy = CASES[case]
    plain = tiny.llama(layers=1)
    expected, _ = play(plain, headwise.HeadwiseCache(plain, policy, evict_every=3))
    compiled = way(tiny.llama(layers=1), backend)
    # Made with what torch made of the model, where that is another object.
    cache = headwise.HeadwiseCache(compiled, policy, evict_every=3)
    found, graphs = play(compiled, cache)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert graphs[1] > 0
    assert set(graphs[1 + WARM :]) == {graphs[-1]}
    # A graph ends where headwise is called, and nowhere else.
    assert all("function marked as skipped" in reason for reason in counters["graph_break"])
    assert any("headwise_attention" in reason for reason in counters["graph_break"])


def test_the_compiler_is_told_once_and_calls_what_it_is_told_to_leave_out():
    headwise.HeadwiseCache(tiny.llama(layers=1), headwise.Full())
    told = list(trace_rules.SKIP_DIRS)
    headwise.HeadwiseCache(tiny.llama(layers=1), headwise.Full())
    assert told == trace_rules.SKIP_DIRS
    assert trace_rules.check_file(headwise.__file__).skipped
    assert not trace_rules.check_file(tiny.__file__).skipped
