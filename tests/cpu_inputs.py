"""Inputs of the compiled CPU kernels: the same call of them and of the reference, by instructions and threads."""

from __future__ import annotations

import pytest
import torch

from headwise.kernels import reference
from headwise.kernels.cpu import backend as cpu
from headwise.types import LogitOptions
from kernel_calls import ragged_decode

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def vectors(request):
    """One of the sets of vector instructions that this processor has."""
    cpu.vectors(request.param)
    yield request.param
    cpu.vectors()


@pytest.fixture
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


# Axes of a test: each set of vector instructions; and with several threads too.
VECTORS = {"indirect": ["vectors"], "vectors": cpu.vectors()}
THREADS = {"indirect": ["vectors", "threads"], "vectors": cpu.vectors(), "threads": [1, 3]}


def both(
    store,
    coded=(),
    *,
    group=3,
    queries=1,
    fresh=1,
    mask=None,
    softcap=None,
    sinks=False,
    with_mass=True,
    sharpness=1.0,
):
    """The same call of the reference and of the compiled kernel, over exact rows and views of codes."""
    (batch, heads), dtype = store.lengths.shape, store.pools["keys"].dtype
    key_dim, value_dim = store.pools["keys"].shape[-1], store.pools["values"].shape[-1]
    # A view, as models hand queries over.
    query = (torch.randn(batch, heads, queries, group, key_dim) * sharpness).to(dtype).transpose(2, 3)
    fresh_keys = torch.randn(batch, heads, fresh, key_dim).to(dtype)
    fresh_values = torch.randn(batch, heads, fresh, value_dim).to(dtype)
    options = LogitOptions(key_dim**-0.5, softcap, torch.randn(heads, group) if sinks else None)
    arguments = (query, [store.view(), *coded], fresh_keys, fresh_values, mask, options)
    return (ragged_decode(k, *arguments, with_mass=with_mass) for k in (reference, cpu))


def check(expected, found, coded=False):
    """Dot products of bytes have queries and weights of 16 bits beside the codes."""
    bound = 2e-4 if coded and cpu.instructions() == "avx512" else 2e-5
    close = {"atol": bound, "rtol": bound}
    rounding = close if found.output.dtype is torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(found.output, expected.output, **rounding)
    torch.testing.assert_close(found.lse, expected.lse, **close)
    assert (found.on_kept is None) == (expected.on_kept is None)
    if expected.on_kept is not None:
        torch.testing.assert_close(found.on_kept, expected.on_kept, **close)
        torch.testing.assert_close(found.on_fresh, expected.on_fresh, **close)
