"""The attention that later choices look at, from pages of exact rows and of codes, against the same by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from headwise.kernels import reference
from headwise.quant.formats import Precision, RowFormat
from headwise.stages.row_attention import RowAttention
from headwise.store.rows import Rows
from headwise.store.store import RowStore
from headwise.types import LogitOptions

B, H, G, D, E = 2, 3, 2, 16, 8
SEEN, COUNT = 37, 5
COLUMNS = torch.tensor([20, 24, 28, 32, 36])
PRECISION = Precision((RowFormat(8, 8), RowFormat(4, 4)), 3, 2, 0)


def held(biased=False, dtype=torch.float32):
    """Rows of some columns in every head: exact ones, and codes in two formats."""
    keep = torch.rand(B, H, SEEN) < torch.tensor([0.1, 0.5, 0.9])[:, None]
    keep[0, 0], keep[0, 1, 20:] = False, True
    keys, values = torch.randn(B, H, SEEN, D).to(dtype), torch.randn(B, H, SEEN, E).to(dtype)
    rows = Rows.of(keys, values, torch.arange(SEEN).expand(B, H, -1), None, keep)
    store = RowStore(rows, page_size=4, scored=False, precision=PRECISION)
    store.fill(rows, torch.randint(-1, 2, (B, H, SEEN)))
    if biased:
        store.bias(torch.randn(B, H, store.longest))
    return store


def asked(store, kernels, **others):
    options = {"options": LogitOptions(0.3), "seen": SEEN} | others
    query = torch.randn(B, H, G, COUNT, D)
    return RowAttention(query, COLUMNS, store=store, kernels=kernels, **options)


def by_hand(attention, at, there):
    """The same, one query of one head at a time, in double precision."""
    rows, options = attention.store.rows(), attention.options
    found = torch.zeros(B, H, G, at.shape[1], rows.keep.shape[2], dtype=torch.double)
    for b, h, g, r in torch.cartesian_prod(*map(torch.arange, found.shape[:4])).tolist():
        index = int(at[b, r])
        sees = rows.keep[b, h] & (rows.columns[b, h] <= COLUMNS[index]) & there[b, r]
        columns = rows.columns[b, h][sees].long()
        logits = rows.keys[b, h][sees].double() @ attention.query[b, h, g, index].double() * options.scaling
        if options.softcap is not None:
            logits = options.softcap * torch.tanh(logits / options.softcap)
        if rows.biases is not None:
            logits = logits + rows.biases[b, h][sees].double()
        if attention.marks is not None:
            there_are = attention.marks.shape[1]
            marks = torch.cat([attention.marks[b], torch.zeros(SEEN - there_are)])[columns]
            logits = logits + attention.gates[h, g].double() * marks.double()
        weights, total = logits.exp(), logits.exp().sum()
        if options.sinks is not None:
            total = total + options.sinks[h, g].double().exp()
        found[b, h, g, r, sees] = weights / total
    return found


@pytest.mark.parametrize("case", ["plain", "biases", "softcap", "sinks", "marks", "marks of the first"])
def test_attention_to_rows_is_that_by_hand(case, kernels):
    store, others = held(case == "biases"), {}
    if case == "softcap":
        others["options"] = LogitOptions(0.3, softcap=1.5)
    if case == "sinks":
        others["options"] = LogitOptions(0.3, sinks=torch.randn(H, G))
    if case.startswith("marks"):
        others["gates"] = torch.randn(H, G)
        others["marks"] = torch.randn(B, SEEN if case == "marks" else 11)
    attention = asked(store, kernels, **others)
    at = torch.tensor([[0, 2, 3], [1, 3, 4]])
    there = torch.tensor([[False, True, True], [True, True, True]])
    found = attention.of(at, there)
    assert found.dtype is torch.float32 and bool((found[0, :, :, 0] == 0).all())
    # A code is off by less than this where it is multiplied as it is.
    torch.testing.assert_close(found.double(), by_hand(attention, at, there), atol=2e-4, rtol=2e-3)


def test_what_a_choice_costs_does_not_grow_with_what_was_seen(monkeypatch):
    asked_for = []
    kernels = replace(reference.KERNELS, ragged_decode=lambda request: asked_for.append(request) or decode(request))
    decode, attention = reference.KERNELS.ragged_decode, asked(held(), kernels)
    attention.of(torch.tensor([[2, 3], [3, 4]]), torch.ones(2, 2, dtype=torch.bool))
    # The columns from that of the first query on, 28 to 36, and one for whatever came before.
    assert {request.mask.shape[2] for request in asked_for} == {10}


def test_it_is_over_rows_that_are_there_while_steps_are_captured(kernels):
    store = held()
    store.reserve(9)
    attention, at = asked(store, kernels), torch.tensor([[0, 4], [0, 4]])
    everything = torch.ones(2, 2, dtype=torch.bool)
    before = attention.of(at, everything)
    store.freeze(True)
    torch.testing.assert_close(attention.of(at, everything), before, atol=0, rtol=0)


def test_rows_in_16_bits_are_read_as_they_are_stored(kernels):
    store = held(dtype=torch.bfloat16)
    attention = asked(store, kernels)
    at, everything = torch.tensor([[4], [4]]), torch.ones(2, 1, dtype=torch.bool)
    torch.testing.assert_close(
        attention.of(at, everything).double(), by_hand(attention, at, everything), atol=2e-2, rtol=2e-2
    )
