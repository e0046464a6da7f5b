"""The compiled CPU kernels of stored rows against the reference: decoding and appending."""

from __future__ import annotations

import itertools

import torch

from cases import pairwise
from cpu_inputs import CPU, DTYPES, THREADS, VECTORS, both, check, threads, vectors
from headwise.kernels import reference
from headwise.kernels.backends import choose
from headwise.kernels.cpu import backend as cpu
from headwise.types import LogitOptions
from kernel_calls import append_rows, ragged_decode
from kernel_inputs import packed

__all__ = ["threads", "vectors"]


@pairwise(group=range(1, 9), dtype=DTYPES, **THREADS)
def test_every_group_size(group, dtype, threads):
    check(*both(packed([[0, 1, 17], [131, 257, 64]], dtype=dtype), group=group))


@pairwise(
    dims=[(1, 1), (7, 11), (16, 16), (24, 40), (64, 64), (80, 80), (96, 128), (128, 64), (192, 128), (256, 256)],
    dtype=DTYPES,
    **VECTORS,
)
def test_every_head_dimension(dims, dtype):
    check(*both(packed([[5, 100], [33, 66]], key_dim=dims[0], value_dim=dims[1], dtype=dtype)))


@pairwise(page_size=[1, 3, 16, 100], rows=[(1, 1), (3, 3), (2, 5), (7, 130)], biased=[False, True], **THREADS)
def test_pages_and_fresh_rows(page_size, rows, biased, threads):
    queries, fresh = rows
    check(*both(packed([[0, 40], [129, 1]], page_size=page_size, biased=biased), queries=queries, fresh=fresh))


@pairwise(softcap=[None, 2.0], sinks=[False, True], masked=[False, True], dtype=DTYPES, biased=[False, True], **THREADS)
def test_masks_caps_and_sinks(softcap, sinks, masked, dtype, biased, threads):
    store, queries, fresh = packed([[0, 50, 7], [90, 33, 1]], dtype=dtype, biased=biased), 3, 4
    mask = None
    if masked:
        # A view with strides of its own; one query sees nothing at all.
        mask = (torch.rand(2, 190, queries) < 0.6).mT[:, :, : 2 * 90 + fresh]
        mask[1, 2] = False
    expected, found = both(store, queries=queries, fresh=fresh, mask=mask, softcap=softcap, sinks=sinks)
    check(expected, found)
    if masked and not sinks:
        assert (found.lse[1, :, :, 2] == -torch.inf).all()
        assert (found.output[1, :, :, 2] == 0).all()


@pairwise(shares=[1, 2, 3, 5, 16, 61], biased=[False, True], **VECTORS)
def test_every_cut_between_threads(shares, biased, monkeypatch):
    """Heads of all lengths are cut anywhere, and may span several shares."""
    monkeypatch.setattr("headwise.kernels.cpu.calls._BYTES_PER_SHARE", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: shares)
    for lengths in ([[300]], [[0, 0, 0]], [[1, 0], [0, 2]], [[37, 0, 1], [400, 3, 5]], [[2, 2, 2, 2]]):
        store = packed(lengths, biased=biased)
        check(*both(store))
        check(*both(store, fresh=0, queries=2) if any(map(any, lengths)) else both(store))


@pairwise(**VECTORS)
def test_nothing_to_see():
    expected, found = both(packed([[0, 0], [0, 4]]), fresh=0)
    check(expected, found)
    assert (found.output[0] == 0).all()
    assert (found.lse[0] == -torch.inf).all()


@pairwise(biased=[False, True], **VECTORS)
def test_without_mass_nothing_is_returned_of_it(biased):
    expected, found = both(packed([[40, 3]], biased=biased), with_mass=False)
    check(expected, found)
    assert found.on_kept is None


@pairwise(sharpness=[1e-3, 30.0, 1e3], **VECTORS)
def test_flat_and_sharp_attention(sharpness):
    """Logits far apart and large: nothing overflows, and what vanishes vanishes."""
    expected, found = both(packed([[300, 65]]), sharpness=sharpness)
    assert found.output.isfinite().all()
    torch.testing.assert_close(found.output, expected.output, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(found.lse, expected.lse, atol=1e-3, rtol=1e-5)


@pairwise(value=[0.0, -0.0, 6e-8, 1e-5, 0.333, 65504.0, -1.5, float("inf")], **VECTORS)
def test_half_precision_is_read_exactly(value):
    """One row alone comes back as it is, denormals and infinity included."""
    store = packed([[0]], key_dim=16, value_dim=17, dtype=torch.float16)
    fresh = torch.full((1, 1, 1, 17), value, dtype=torch.float16)
    key = torch.zeros(1, 1, 1, 16, dtype=torch.float16)
    found = ragged_decode(cpu, key[:, :, None], [store.view()], key, fresh, None, LogitOptions(1.0), with_mass=False)
    assert torch.equal(found.output[0, 0, 0], fresh[0, 0])


@pairwise(dtype=DTYPES, scored=[False, True], biased=[False, True], padded=[False, True], fresh=[1, 20])
def test_append(dtype, scored, biased, padded, fresh):
    torch.manual_seed(1)
    lengths = [[0, 15, 16], [1, 33, 100]]
    stores = []
    rows = torch.randn(2, fresh, 3, 16).to(dtype).transpose(1, 2), torch.randn(2, 3, fresh, 16).to(dtype)
    real = torch.rand(2, fresh) < 0.5 if padded else None
    more = (torch.rand(2, 3, fresh), torch.rand(2, 3, 100)) if scored else (None, None)
    for name in ("reference", "cpu"):
        torch.manual_seed(2)
        store = packed(lengths, key_dim=16, value_dim=16, dtype=dtype, scored=scored, biased=biased)
        columns = torch.arange(500, 500 + fresh, dtype=torch.int32)
        append_rows(store, *rows, columns, real, *more, choose(name, CPU))
        stores.append(store)
    one, other = stores
    added = fresh if real is None else real.sum(dim=1)[:, None]
    assert torch.equal(other.lengths, torch.tensor(lengths) + added)
    assert torch.equal(one.lengths, other.lengths)
    held = one.occupied()
    assert torch.equal(one.kept("columns")[held], other.kept("columns")[held])
    for mine, its in zip((one.rows().keys, one.rows().values), (other.rows().keys, other.rows().values), strict=True):
        assert torch.equal(mine[held], its[held])
    if scored:
        torch.testing.assert_close(one.kept("scores")[held], other.kept("scores")[held])
    if biased:
        new = torch.arange(held.shape[-1]) >= torch.tensor(lengths)[:, :, None]
        assert (other.kept("biases")[held & new] == 0).all()
        assert torch.equal(one.kept("biases")[held], other.kept("biases")[held])


@pairwise(**THREADS)
def test_reading_a_buffer_sums_its_bits(threads):
    numbers = torch.randint(-100, 100, (1001,))
    assert cpu.read(numbers) == int(numbers.sum())


@pairwise(**VECTORS)
def test_parallel_calls_from_several_threads_do_not_share_memory():
    from concurrent.futures import ThreadPoolExecutor

    stores = [packed([[n, 2 * n]]) for n in (10, 200, 31, 77)]
    queries = [torch.randn(1, 2, 3, 1, 64) for _ in stores]
    fresh = torch.randn(1, 2, 1, 64)

    def call(kernel, index):
        return ragged_decode(
            kernel, queries[index], [stores[index].view()], fresh, fresh, None, LogitOptions(0.1), with_mass=True
        )

    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(call, cpu, i % 4) for i in range(200)]
        for i, job in enumerate(itertools.islice(jobs, 200)):
            check(call(reference, i % 4), job.result())
