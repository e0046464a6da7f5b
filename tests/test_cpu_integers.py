"""The compiled kernels on codes, by products of integers and of floats: how much these lose, and their borders."""

from __future__ import annotations

import pytest
import torch

from cases import pairwise
from cpu_inputs import VECTORS, vectors
from headwise.kernels import reference
from headwise.kernels.cpu import backend as cpu
from headwise.quant.formats import RowFormat
from headwise.types import LogitOptions
from kernel_calls import coded_like, ragged_decode
from kernel_inputs import packed, packed_codes

__all__ = ["vectors"]

HEADS, GROUP = 3, 3


def numbers_and_codes(format, rows, dim, sharp):
    """Rows of which one key per head is alike to its queries, as numbers and as codes; and the queries."""
    store = packed([[rows] * HEADS], key_dim=dim, value_dim=dim)
    kept = store.rows()
    # Channels of very different size and offset, as those of keys are.
    keys = kept.keys * (torch.rand(dim) * 2) + torch.randn(dim)
    values = kept.values * torch.rand(dim) + torch.randn(dim)
    query = torch.randn(1, HEADS, GROUP, 1, dim) * sharp
    keys[:, :, 5] += query[:, :, 0, 0] * 0.5
    kept = kept.replacing(keys=keys, values=values)
    store.replace("keys", keys)
    store.replace("values", values)
    part = coded_like(kept, format, page_size=16, scored=False)
    part.pool.commit(part.pool.occupied(), part.encode(kept))
    return store, part.view(), query


def decoded(kernels, query, pages):
    dim = query.shape[-1]
    none = torch.zeros(1, HEADS, 0, dim)
    return ragged_decode(kernels, query, pages, none, none, None, LogitOptions(dim**-0.5), with_mass=True)


@pairwise(
    format=[
        RowFormat(8, 8),
        RowFormat(8, 4),
        RowFormat(4, 8),
        RowFormat(4, 4),
        RowFormat(8, 8, 16),
        RowFormat(4, 4, 32),
    ],
    dim=[64, 128],
    rows=[300, 3000],
    sharp=[0.3, 1.0, 3.0],
    **VECTORS,
)
def test_products_lose_a_twentieth_of_what_codes_lose(format, dim, rows, sharp):
    numbers, codes, query = numbers_and_codes(format, rows, dim, sharp)
    empty = packed([[0] * HEADS], key_dim=dim, value_dim=dim).view()
    exact = decoded(reference, query, [numbers.view()])
    wanted, found = decoded(reference, query, [empty, codes]), decoded(cpu, query, [empty, codes])
    torch.testing.assert_close(found.lse, wanted.lse, atol=1e-4, rtol=2e-5)
    for name in ("output", "on_kept"):
        by_codes = (getattr(wanted, name) - getattr(exact, name)).norm()
        by_products = (getattr(found, name) - getattr(wanted, name)).norm()
        assert by_codes > 0
        assert by_products < by_codes / 20, name


@pairwise(format=[RowFormat(8, 8), RowFormat(4, 4)], **VECTORS)
def test_an_error_does_not_gather_in_one_channel(format):
    """Codes are never negative: what is lost of the sum of the weights would go into all channels alike, and when these
    are rotated back, into the first alone."""
    _, codes, query = numbers_and_codes(format, 3000, 64, 1.0)
    empty = packed([[0] * HEADS]).view()
    lost = decoded(cpu, query, [empty, codes]).output - decoded(reference, query, [empty, codes]).output
    by_channel = lost.square().mean(dim=(0, 1, 2, 3)).sqrt()
    assert by_channel[0] < 4 * by_channel[1:].mean() + 1e-6


@pairwise(size=[0.0, 1e-40, 1e-30, 1e-6, 1e6], bits=[4, 8], **VECTORS)
def test_queries_of_any_size(size, bits):
    codes = packed_codes([[70, 3, 0]], RowFormat(bits, bits)).view()
    empty = packed([[0, 0, 1]]).view()
    # With logits of a million one row has all.
    query = torch.randn(1, HEADS, GROUP, 1, 64) * size
    wanted, found = decoded(reference, query, [empty, codes]), decoded(cpu, query, [empty, codes])
    torch.testing.assert_close(found.lse, wanted.lse, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(found.output, wanted.output, atol=2e-4, rtol=2e-4)


@pairwise(bits=[4, 8], **VECTORS)
def test_one_query_is_as_large_as_the_others_are_small(bits):
    """Each has a scale of its own."""
    codes, empty = packed_codes([[70, 3, 9]], RowFormat(bits, bits)).view(), packed([[0, 0, 0]]).view()
    query = torch.randn(1, HEADS, GROUP, 1, 64) * torch.tensor([1e-3, 1.0, 1e4]).view(1, 1, GROUP, 1, 1)
    wanted, found = decoded(reference, query, [empty, codes]), decoded(cpu, query, [empty, codes])
    torch.testing.assert_close(found.output, wanted.output, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(found.lse, wanted.lse, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pairwise(bits=[4, 8], dim=[64, 40], **VECTORS)
def test_what_is_no_number_makes_no_answer(bits, dim, wrong):
    """Only of the query that has it."""
    codes = packed_codes([[70, 3, 9]], RowFormat(bits, bits), key_dim=dim, value_dim=dim).view()
    empty = packed([[0, 0, 0]], key_dim=dim, value_dim=dim).view()
    query = torch.randn(1, HEADS, GROUP, 1, dim)
    query[0, 1, 2, 0, 7] = wrong
    found = decoded(cpu, query, [empty, codes])
    finite = found.output.isfinite().all(dim=-1)[..., 0]
    assert finite.sum() == HEADS * GROUP - 1
    assert not finite[0, 1, 2]


@pairwise(bits=[4, 8], rows=[1, 15, 16, 17, 127, 128, 129, 144], page_size=[5, 8, 16, 32], **VECTORS)
def test_the_last_rows_of_a_chunk(bits, rows, page_size):
    """What lies behind a head's rows, and in pages that are not its own, does not count."""
    codes = packed_codes([[rows, 1, 40]], RowFormat(bits, bits), page_size=page_size).view()
    exact = packed([[1, 0, 0]], page_size=page_size).view()
    query = torch.randn(1, HEADS, GROUP, 1, 64)
    wanted, found = decoded(reference, query, [exact, codes]), decoded(cpu, query, [exact, codes])
    torch.testing.assert_close(found.output, wanted.output, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(found.on_kept, wanted.on_kept, atol=2e-4, rtol=2e-4)


def test_a_processor_uses_the_last_set_it_has():
    try:
        for name in cpu.vectors():
            cpu.vectors(name)
            assert cpu.instructions() == name
    finally:
        best = cpu.vectors()[-1]
    assert cpu.instructions() == best
