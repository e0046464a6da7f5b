"""LESS by its parts: features of queries and keys, and the state that evicted rows leave behind."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

import tiny
from headwise.less.state import EvictedState, blend
from less_oracle import FEATURES, WIDTH, close, draw, kernels_of, networks_of, state

# Kernels.


@pytest.mark.parametrize("group", [1, 3])
def test_features_are_those_of_the_networks_that_were_trained(group):
    networks = draw(2, group, 16)
    kernels, query, keys = networks.folded(), torch.randn(3, 2, group, 5, 16), torch.randn(3, 2, 7, 16)
    assert kernels.count == FEATURES
    for found, expected in (
        (kernels.of_queries(query), networks.phi(query)),
        (kernels.of_keys(keys), networks.psi(keys)),
    ):
        close(found, expected, 1e-6)
        assert bool((found >= 0).all())
        assert expected.max() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_features_are_computed_in_fp32(dtype):
    kernels, keys = draw(2, 3, 16).folded(), torch.randn(1, 2, 7, 16).to(dtype)
    assert kernels.of_keys(keys).dtype == torch.float32
    torch.testing.assert_close(kernels.of_keys(keys), kernels.of_keys(keys.float()), rtol=0, atol=0)


def test_the_size_is_that_of_the_paper_with_the_key_network_folded():
    queries, keys, dim = 6, 2, 14
    networks = networks_of(tiny.llama(layers=2))
    numbers = queries * (dim * WIDTH + WIDTH * FEATURES) + keys * (dim * WIDTH + WIDTH * FEATURES + FEATURES**2)
    assert networks[0].folded().nbytes == 4 * numbers
    assert kernels_of(tiny.llama(layers=2), networks).nbytes == 2 * 4 * numbers


def test_kernels_are_known_by_their_content():
    model = tiny.llama()
    one, same = (kernels_of(model, networks_of(model)) for _ in range(2))
    other = kernels_of(model, {**networks_of(model), 1: draw(2, 3, 14, seed=9)})
    assert repr(one) == repr(same) != repr(other)
    assert "LESS kernels" in repr(one)


def test_kernels_are_copied_to_a_device_once():
    kernels, device = draw(2, 3, 16).folded(), torch.device("meta")
    assert kernels.to(torch.device("cpu")) is kernels
    assert kernels.to(device) is kernels.to(device)
    assert {tensor.device for tensor in kernels.to(device).tensors().values()} == {device}


# Memory.


def filled(keys, values, order):
    """A memory into which the rows were folded in groups, in that order."""
    memory = EvictedState(draw(*keys.shape[1:2], 1, keys.shape[-1]).folded())
    for rows in order:
        dropped = torch.zeros(keys.shape[:3], dtype=torch.bool)
        dropped[:, :, rows] = True
        memory.fold(keys, values, dropped)
    return memory


@pytest.mark.parametrize(
    "order",
    [[list(range(30))], [[n] for n in range(30)], [[n] for n in reversed(range(30))], [[3, 9], [*range(10, 30)], [0]]],
    ids=["at-once", "one-by-one", "backwards", "some"],
)
def test_the_state_is_the_sum_over_the_rows_in_any_order(order):
    keys, values = torch.randn(2, 3, 30, 16), torch.randn(2, 3, 30, 7)
    memory = filled(keys, values, order)
    gone = torch.zeros(2, 3, 30, dtype=torch.bool)
    gone[:, :, list(itertools.chain(*order))] = True
    sums, mass = state(draw(3, 1, 16), keys, values, gone)
    torch.testing.assert_close(memory.sums.double(), sums, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(memory.mass.double(), mass, rtol=1e-5, atol=1e-5)
    assert {tensor.dtype for tensor in memory.state().values()} == {torch.float32}


def test_every_head_folds_its_own_rows_however_many_there_are():
    """More than are computed at a time, and not the same in every head."""
    keys, values = torch.randn(2, 3, 2500, 16), torch.randn(2, 3, 2500, 16)
    dropped = torch.rand(2, 3, 2500) < 0.3
    dropped[1, 2] = False
    memory = EvictedState(draw(3, 1, 16).folded())
    memory.fold(keys, values, dropped)
    sums, mass = state(draw(3, 1, 16), keys, values, dropped)
    close(memory.sums, sums, 1e-5)
    close(memory.mass, mass, 1e-5)
    assert not memory.mass[1, 2].any()


def test_rows_that_are_not_named_may_hold_anything():
    keys, values = torch.randn(1, 2, 20, 16), torch.randn(1, 2, 20, 16)
    dropped = torch.rand(1, 2, 20) < 0.5
    clean, poisoned = (EvictedState(draw(2, 1, 16).folded()) for _ in range(2))
    clean.fold(keys, values, dropped)
    for each in (keys, values):
        each[~dropped] = torch.nan
    poisoned.fold(keys, values, dropped)
    assert torch.equal(clean.sums, poisoned.sums)
    assert torch.equal(clean.mass, poisoned.mass)


def test_without_kernels_or_evicted_rows_attention_is_what_it_was():
    rows = torch.randn(1, 2, 4, 16), torch.randn(1, 2, 4, 16)
    query, output, lse = torch.randn(1, 2, 3, 1, 16), torch.randn(1, 2, 3, 1, 16), torch.randn(1, 2, 3, 1)
    forgetful, empty, allocated = (
        EvictedState(None),
        EvictedState(draw(2, 3, 16).folded()),
        EvictedState(draw(2, 3, 16).folded()),
    )
    forgetful.fold(*rows, torch.ones(1, 2, 4, dtype=torch.bool))
    empty.fold(*rows, torch.zeros(1, 2, 4, dtype=torch.bool))
    allocated.allocate(torch.Size([1, 2]), 16, output.device)
    assert forgetful.state() == empty.state() == {}
    for memory in (forgetful, empty, allocated):
        assert torch.equal(memory.merge(query, output, lse), output)
    assert not forgetful.remembers
    assert empty.remembers


@pytest.mark.parametrize("level", [0, 20, -20, 80, -80])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_blending_equals_the_definition_at_any_level(level, scale):
    logits, weights = torch.randn(50, 9, dtype=torch.double) + level, torch.rand(50, 6, dtype=torch.double) * scale
    kept, gone = torch.randn(50, 9, 7, dtype=torch.double), torch.randn(50, 6, 7, dtype=torch.double)
    both = torch.cat([logits.exp(), weights], 1)
    expected = (both[:, :, None] * torch.cat([kept, gone], 1)).sum(1) / both.sum(1, keepdim=True)
    output = (logits.softmax(1)[:, :, None] * kept).sum(1).float()
    sums, mass = (weights[:, :, None] * gone).sum(1).float(), weights.sum(1).float()
    found = blend(output, logits.logsumexp(1).float(), sums, mass)
    assert float((found - expected).abs().max()) <= 1e-6


def test_blending_with_nothing_on_one_side_or_both():
    output, sums = torch.tensor([[3.0], [0.0], [0.0]]), torch.tensor([[0.0], [10.0], [0.0]])
    lse, mass = torch.tensor([1.0, -torch.inf, -torch.inf]), torch.tensor([0.0, 4.0, 0.0])
    assert blend(output, lse, sums, mass).tolist() == [[3.0], [2.5], [0.0]]


def test_gradients_are_finite_where_nothing_was_folded_in():
    output, sums = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    lse, mass = torch.randn(4, requires_grad=True), torch.tensor([0.0, 0.0, 1e-30, 2.0], requires_grad=True)
    blend(output, lse, sums, mass).sum().backward()
    for each in (output, lse, mass, sums):
        assert bool(each.grad[[0, 1, 3]].isfinite().all())
    assert torch.equal(output.grad[0], torch.ones(5))


def test_a_state_can_be_selected_moved_saved_and_forgotten():
    keys, values = torch.randn(3, 2, 9, 16), torch.randn(3, 2, 9, 16)
    memory = filled(keys, values, [list(range(9))])
    whole = copy.copy(memory.state())
    other = EvictedState(memory.features)
    other.restore(memory.state())
    assert other.sums is memory.sums
    memory.select(torch.tensor([2, 0, 2]))
    assert torch.equal(memory.sums, whole["less_sums"][[2, 0, 2]])
    assert torch.equal(memory.mass, whole["less_mass"][[2, 0, 2]])
    memory.to(torch.device("meta"))
    assert {tensor.device.type for tensor in memory.state().values()} == {"meta"}
    memory.reset()
    assert memory.state() == {}
