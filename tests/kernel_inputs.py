"""Kernel inputs: lengths -> pages with random rows, exact or as codes; one definition for all tests of kernels."""

from __future__ import annotations

import torch

from headwise.store.rows import Rows
from kernel_calls import coded_like, pool_like


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
