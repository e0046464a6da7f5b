"""Kernel inputs: lengths -> pages with random rows, exact or as codes, and requests over them.

One definition for all tests of kernels, those that `tools/gpu.py` makes on a GPU among them.
"""

from __future__ import annotations

import torch

from headwise.kernels.interface import DecodeRequest, Marks
from headwise.store.rows import Rows
from headwise.types import LogitOptions
from kernel_calls import coded_like, pool_like


def poisoning(allocate):
    """Memory that is NaN, or an absurd column or code, so that whoever reads slack is caught."""

    def poisoned(*shape, dtype, device):
        fresh = allocate(*shape, dtype=dtype, device=device)
        if dtype.is_floating_point:
            return fresh.fill_(float("nan"))
        return fresh.fill_(255 if dtype is torch.uint8 else 2**30)

    return poisoned


def packed(lengths, key_dim=64, value_dim=64, dtype=torch.float32, page_size=16, scored=False, biased=False):
    """A pool of random rows with those lengths; columns have gaps and no order, and not all pages are full."""
    lengths = torch.tensor(lengths)
    longest = max(1, int(lengths.max()))
    keys, values = (torch.randn(*lengths.shape, longest, dim).to(dtype) for dim in (key_dim, value_dim))
    columns = (torch.randperm(longest) * 2).expand(*lengths.shape, -1)
    scores = torch.rand(columns.shape) if scored else None
    rows = Rows.of(keys, values, columns, scores, torch.arange(longest) < lengths[:, :, None])
    if biased:
        rows = rows.replacing(biases=torch.randn(columns.shape).half())
    store = pool_like(rows, page_size=page_size, scored=scored, biased=biased)
    store.commit(store.occupied(), rows, spare=page_size)
    return store


def packed_codes(
    lengths, format, key_dim=64, value_dim=64, dtype=torch.float32, page_size=16, scored=False, biased=False
):
    """The same in codes of that format; channels are of very different size and offset, as those of keys are."""
    lengths = torch.tensor(lengths)
    longest = max(1, int(lengths.max()))
    keys, values = (
        (torch.randn(*lengths.shape, longest, dim) * torch.rand(dim) * 2 + torch.randn(dim)).to(dtype)
        for dim in (key_dim, value_dim)
    )
    columns = (torch.randperm(longest) * 2).expand(*lengths.shape, -1)
    scores = torch.rand(columns.shape) if scored else None
    rows = Rows.of(keys, values, columns, scores, torch.arange(longest) < lengths[:, :, None])
    if biased:
        rows = rows.replacing(biases=torch.randn(columns.shape).half())
    part = coded_like(rows, format, page_size=page_size, scored=scored, biased=biased)
    # With pages to spare: there is memory that no row has written.
    part.pool.commit(part.pool.occupied(), part.encode(rows), spare=page_size + 1)
    return part


def poison(*shape, dtype=torch.float32):
    return torch.full(shape, float("nan"), dtype=dtype)


def filled(*arguments, **options):
    """A store whose lengths have strides of their own."""
    store = packed(*arguments, **options)
    store.pages.lengths = store.lengths.T.contiguous().T
    return store


def strided(*shape, dtype=torch.float32):
    """Random numbers as models hand them over: [b, h, ...] views of what was computed as [b, ..., h]."""
    return torch.randn(shape[0], *shape[2:-1], shape[1], shape[-1]).to(dtype).movedim(-2, 1)


def some_marks(batch, heads, group, queries, marked, fresh=None, *, expanded=False):
    """Marks of the first columns and of fresh rows, and gates, of which every third head has none.

    Gates have strides as where they were made as [b, q, h, g], or are the same for all sequences and queries. Behind
    the marks of a sequence lies what must not be read.
    """
    shape = (1, 1, heads, group) if expanded else (batch, queries, heads, group)
    without = torch.arange(heads * group).view(heads, group) % 3 == 1
    gates = torch.randn(shape).masked_fill(without, 0).movedim(1, 3).expand(batch, -1, -1, queries)
    columns = poison(batch, marked + 3)[:, 1 : marked + 1]
    columns.copy_(torch.randn(columns.shape) * (torch.rand(columns.shape) < 0.6))
    return Marks(gates, columns, None if fresh is None else torch.randn(batch, fresh + 1)[:, :fresh])


def coded_pages(*arguments, **options):
    """Pages of codes whose lengths have strides of their own."""
    part = packed_codes(*arguments, **options)
    part.pool.pages.lengths = part.pool.lengths.T.contiguous().T
    return part


def decode_request(store, group, queries, fresh, *, coded=(), masked=False, options=None, with_mass=True, marks=None):
    """Random queries and fresh rows over the rows of a store and of views of codes."""
    batch, heads = store.lengths.shape
    dtype, key_dim, value_dim = (
        store.pools["keys"].dtype,
        store.pools["keys"].shape[-1],
        store.pools["values"].shape[-1],
    )
    options = options or LogitOptions(key_dim**-0.5)
    views = [store.view(), *coded]
    query = strided(batch, heads, group, queries, key_dim, dtype=dtype)
    # A slice, as `decode` hands them over.
    fresh_keys = strided(batch, heads, fresh + 1, key_dim, dtype=dtype)[:, :, :fresh]
    fresh_values = strided(batch, heads, fresh + 1, value_dim, dtype=dtype)[:, :, :fresh]
    mask = None
    if masked:
        mask = torch.rand(batch, queries + 1, 2 * max(view.longest for view in views) + fresh)[:, 1:] < 0.6
        mask[0, 0] = False  # sees nothing at all
    return DecodeRequest(query, views, fresh_keys, fresh_values, mask, options, with_mass, marks)


def content_of(store):
    """Everything in the store below each head's length, as numbers that can be compared."""
    rows = store.rows()
    keep = store.occupied()
    contents = [rows.keys, rows.values, rows.columns, rows.scores, rows.biases]
    return [store.lengths.clone(), *(content[keep] for content in contents if content is not None)]
