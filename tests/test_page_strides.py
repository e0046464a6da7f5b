"""Pages of another host's pool: rows with any strides, as where keys lie transposed, and pages without columns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cases import pairwise
from headwise.kernels.backends import choose
from headwise.kernels.interface import AppendRequest, DecodeRequest
from headwise.store.rows import Rows
from headwise.types import LogitOptions
from kernel_calls import new_pool

CPU = torch.device("cpu")
LENGTHS = torch.tensor([[0, 5, 33], [16, 70, 1]])


def filled(dtype=torch.float32, key_dim=11, value_dim=7, page_size=3):
    longest = int(LENGTHS.max())
    keys, values = torch.randn(2, 3, longest, key_dim).to(dtype), torch.randn(2, 3, longest, value_dim).to(dtype)
    columns = (torch.arange(longest) * 2).expand(2, 3, -1)
    pool = new_pool(
        batch=2, heads=3, key_dim=key_dim, value_dim=value_dim, dtype=dtype, page_size=page_size, scored=False
    )
    rows = Rows.of(keys, values, columns, None, torch.arange(longest) < LENGTHS[:, :, None])
    pool.commit(pool.occupied(), rows, spare=4)
    return pool


def transposed(pool):
    """The same rows, channel by channel inside a page: `[pages, d, s]`."""
    return pool.mT.contiguous().mT


def inside_wider_rows(pool):
    """The same rows in a pool whose rows have room for more."""
    wider = torch.full((*pool.shape[:2], pool.shape[2] + 5), float("nan"), dtype=pool.dtype)
    wider[..., : pool.shape[2]] = pool
    return wider[..., : pool.shape[2]]


def between_others(pool):
    """The same rows, with those of another between them, as heads of one block have."""
    both = torch.full((pool.shape[0], 2, *pool.shape[1:]), float("nan"), dtype=pool.dtype)
    both[:, 1] = pool
    return both[:, 1]


LAYOUTS = {layout.__name__: layout for layout in (transposed, inside_wider_rows, between_others)}
NAMES = ["reference", "cpu", "triton"]


@pairwise(of_keys=LAYOUTS, of_values=LAYOUTS, name=NAMES)
def test_strides_change_nothing(of_keys, of_values, name):
    kernels, view = choose(name, CPU), filled().view()
    other = replace(view, keys=LAYOUTS[of_keys](view.keys), values=LAYOUTS[of_values](view.values))
    assert other.keys.stride() != view.keys.stride()
    mask = torch.rand(2, 2, 2 * int(LENGTHS.max()) + 3) < 0.7
    query, keys, values = torch.randn(2, 3, 2, 2, 11), torch.randn(2, 3, 3, 11), torch.randn(2, 3, 3, 7)
    for seen in (None, mask):
        expected, found = (
            kernels.ragged_decode(DecodeRequest(query, [pages], keys, values, seen, LogitOptions(0.3), with_mass=True))
            for pages in (view, other)
        )
        torch.testing.assert_close(found.output, expected.output)
        torch.testing.assert_close(found.lse, expected.lse)
        torch.testing.assert_close(found.on_kept, expected.on_kept)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_new_rows_are_written_where_they_belong(layout, name):
    kernels = choose(name, CPU)
    keys, values = torch.randn(2, 3, 4, 11), torch.randn(2, 3, 4, 7)
    real = torch.tensor([[True, False, True, True], [True, True, True, False]])
    written = []
    for change in (torch.clone, LAYOUTS[layout]):
        torch.manual_seed(3)
        pool = filled()
        view = pool.view()
        pages = replace(view, keys=change(view.keys), values=change(view.values))
        kernels.append(AppendRequest([pages], keys, values, torch.arange(4).int() + 500, real))
        assert torch.equal(pages.lengths, LENGTHS + 3)
        at = pool.pages.addresses(int(LENGTHS.max()) + 3)
        there = torch.arange(at.shape[-1]) < pages.lengths[:, :, None]
        written.append([each.flatten(0, 1)[at][there] for each in (pages.keys, pages.values, pages.columns)])
    for found, expected in zip(*written, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_lies_transposed_too(dtype, name):
    kernels, view = choose(name, CPU), filled(dtype, 16, 16, page_size=16).view()
    other = replace(view, keys=transposed(view.keys))
    query, row = torch.randn(2, 3, 1, 1, 16).to(dtype), torch.randn(2, 3, 1, 16).to(dtype)
    expected, found = (
        kernels.ragged_decode(DecodeRequest(query, [pages], row, row, None, LogitOptions(0.3)))
        for pages in (view, other)
    )
    torch.testing.assert_close(found.output, expected.output)


@pytest.mark.parametrize("name", NAMES)
def test_without_a_mask_columns_are_not_needed(name):
    kernels, pool = choose(name, CPU), filled()
    view, rows = pool.view(), (torch.randn(2, 3, 1, 11), torch.randn(2, 3, 1, 7))
    query = torch.randn(2, 3, 2, 1, 11)
    expected, found = (
        kernels.ragged_decode(DecodeRequest(query, [pages], *rows, None, LogitOptions(0.3)))
        for pages in (view, replace(view, columns=None))
    )
    torch.testing.assert_close(found.output, expected.output)
    kernels.append(AppendRequest([replace(view, columns=None)], *rows, torch.tensor([9]).int()))
    assert torch.equal(view.lengths, LENGTHS + 1)
