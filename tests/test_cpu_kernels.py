"""The compiled CPU kernels against the reference, and what happens where they cannot run."""

from __future__ import annotations

import copy
import itertools
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import headwise
import tiny
from cases import pairwise
from headwise.hosts.transformers.cache import HeadwiseWarning
from headwise.kernels import reference
from headwise.kernels.backends import check_name, choose, obstacle
from headwise.kernels.cpu import backend as cpu
from headwise.kernels.cpu import library as cpu_library
from headwise.store.rows import Rows
from headwise.types import LogitOptions
from kernel_calls import append_rows, attention_and_peaks, column_mass, pool_like, ragged_decode

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


def filled(lengths, *, key_dim=64, value_dim=64, dtype=torch.float32, page_size=16, scored=False):
    """A store with random rows; columns have gaps."""
    lengths = torch.tensor(lengths)
    batch, heads = lengths.shape
    longest = int(lengths.max())
    keys = torch.randn(batch, heads, longest, key_dim).to(dtype)
    values = torch.randn(batch, heads, longest, value_dim).to(dtype)
    keep = torch.arange(longest) < lengths[:, :, None]
    columns = (torch.arange(longest) * 2).expand(batch, heads, -1)
    rows = Rows.of(keys, values, columns, torch.rand(keep.shape) if scored else None, keep)
    store = pool_like(rows, page_size=page_size, scored=scored)
    store.commit(store.occupied(), rows)
    return store


def both(store, *, group=3, queries=1, fresh=1, mask=None, softcap=None, sinks=False, with_mass=True, sharpness=1.0):
    """The same call of the reference and of the compiled kernel."""
    (batch, heads), dtype = store.lengths.shape, store.pools["keys"].dtype
    key_dim, value_dim = store.pools["keys"].shape[-1], store.pools["values"].shape[-1]
    query = (torch.randn(batch, heads, group, queries, key_dim) * sharpness).to(dtype)
    fresh_keys = torch.randn(batch, heads, fresh, key_dim).to(dtype)
    fresh_values = torch.randn(batch, heads, fresh, value_dim).to(dtype)
    options = LogitOptions(key_dim**-0.5, softcap, torch.randn(heads, group) if sinks else None)
    arguments = (query, [store.view()], fresh_keys, fresh_values, mask, options)
    return (ragged_decode(k, *arguments, with_mass=with_mass) for k in (reference, cpu))


def check(expected, found):
    close = {"atol": 2e-5, "rtol": 2e-5}
    rounding = close if found.output.dtype is torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(found.output, expected.output, **rounding)
    torch.testing.assert_close(found.lse, expected.lse, **close)
    assert (found.on_kept is None) == (expected.on_kept is None)
    if expected.on_kept is not None:
        torch.testing.assert_close(found.on_kept, expected.on_kept, **close)
        torch.testing.assert_close(found.on_fresh, expected.on_fresh, **close)


@pairwise(group=range(1, 9), dtype=DTYPES, **THREADS)
def test_every_group_size(group, dtype, threads):
    check(*both(filled([[0, 1, 17], [131, 257, 64]], dtype=dtype), group=group))


@pairwise(
    dims=[(1, 1), (7, 11), (16, 16), (24, 40), (64, 64), (80, 80), (96, 128), (128, 64), (192, 128), (256, 256)],
    dtype=DTYPES,
    **VECTORS,
)
def test_every_head_dimension(dims, dtype):
    check(*both(filled([[5, 100], [33, 66]], key_dim=dims[0], value_dim=dims[1], dtype=dtype)))


@pairwise(page_size=[1, 3, 16, 100], rows=[(1, 1), (3, 3), (2, 5), (7, 130)], **THREADS)
def test_pages_and_fresh_rows(page_size, rows, threads):
    queries, fresh = rows
    check(*both(filled([[0, 40], [129, 1]], page_size=page_size), queries=queries, fresh=fresh))


@pairwise(softcap=[None, 2.0], sinks=[False, True], masked=[False, True], dtype=DTYPES, **THREADS)
def test_masks_caps_and_sinks(softcap, sinks, masked, dtype, threads):
    store, queries, fresh = filled([[0, 50, 7], [90, 33, 1]], dtype=dtype), 3, 4
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


@pairwise(shares=[1, 2, 3, 5, 16, 61], **VECTORS)
def test_every_cut_between_threads(shares, monkeypatch):
    """Heads of all lengths are cut anywhere, and may span several shares."""
    monkeypatch.setattr("headwise.kernels.cpu.calls._BYTES_PER_SHARE", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: shares)
    for lengths in ([[300]], [[0, 0, 0]], [[1, 0], [0, 2]], [[37, 0, 1], [400, 3, 5]], [[2, 2, 2, 2]]):
        check(*both(filled(lengths)))
        check(*both(filled(lengths), fresh=0, queries=2) if any(map(any, lengths)) else both(filled(lengths)))


@pairwise(**VECTORS)
def test_nothing_to_see():
    expected, found = both(filled([[0, 0], [0, 4]]), fresh=0)
    check(expected, found)
    assert (found.output[0] == 0).all()
    assert (found.lse[0] == -torch.inf).all()


@pairwise(**VECTORS)
def test_without_mass_nothing_is_returned_of_it():
    expected, found = both(filled([[40, 3]]), with_mass=False)
    check(expected, found)
    assert found.on_kept is None


@pairwise(sharpness=[1e-3, 30.0, 1e3], **VECTORS)
def test_flat_and_sharp_attention(sharpness):
    """Logits far apart and large: nothing overflows, and what vanishes vanishes."""
    expected, found = both(filled([[300, 65]]), sharpness=sharpness)
    assert found.output.isfinite().all()
    torch.testing.assert_close(found.output, expected.output, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(found.lse, expected.lse, atol=1e-3, rtol=1e-5)


@pairwise(value=[0.0, -0.0, 6e-8, 1e-5, 0.333, 65504.0, -1.5, float("inf")], **VECTORS)
def test_half_precision_is_read_exactly(value):
    """One row alone comes back as it is, denormals and infinity included."""
    store = filled([[0]], key_dim=16, value_dim=17, dtype=torch.float16)
    fresh = torch.full((1, 1, 1, 17), value, dtype=torch.float16)
    key = torch.zeros(1, 1, 1, 16, dtype=torch.float16)
    found = ragged_decode(cpu, key[:, :, None], [store.view()], key, fresh, None, LogitOptions(1.0), with_mass=False)
    assert torch.equal(found.output[0, 0, 0], fresh[0, 0])


@pairwise(dtype=DTYPES, scored=[False, True], padded=[False, True], fresh=[1, 20])
def test_append(dtype, scored, padded, fresh):
    torch.manual_seed(1)
    lengths = [[0, 15, 16], [1, 33, 100]]
    stores = []
    rows = torch.randn(2, fresh, 3, 16).to(dtype).transpose(1, 2), torch.randn(2, 3, fresh, 16).to(dtype)
    real = torch.rand(2, fresh) < 0.5 if padded else None
    more = (torch.rand(2, 3, fresh), torch.rand(2, 3, 100)) if scored else (None, None)
    for name in ("reference", "cpu"):
        torch.manual_seed(2)
        store = filled(lengths, key_dim=16, value_dim=16, dtype=dtype, scored=scored)
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


def mass_inputs(dtype=torch.float32, *, queries, total=83, pads=(0, 0), group=3):
    query, keys = torch.randn(2, 2, group, queries, 24).to(dtype), torch.randn(2, 2, total, 24).to(dtype)
    real = torch.arange(total)[None] >= torch.tensor(pads)[:, None]
    positions = (real.cumsum(1) - 1).clamp(min=0)
    columns = torch.sort(torch.randperm(total)[:queries]).values
    mask = None
    if any(pads):
        mask = real[:, None] & (torch.arange(total)[None, None] <= columns[:, None])
    weights = torch.rand(2, queries) * real[:, columns]
    weights[:, 0] = 0
    return query, keys, columns, mask, weights, positions


@pairwise(pads=[(0, 0), (0, 29)], queries=[1, 40, 83], kind=["plain", "softcap", "sinks"], dtype=DTYPES, **THREADS)
def test_column_mass(pads, queries, kind, dtype, threads, monkeypatch):
    query, keys, columns, mask, weights, positions = mass_inputs(dtype, queries=queries, pads=pads)
    options = LogitOptions(0.3, 2.0 if kind == "softcap" else None, torch.randn(2, 3) if kind == "sinks" else None)
    widths = torch.tensor([[20, 7], [1, 60], [200, 200]])
    arguments = (query, keys, columns, mask, options, weights, positions, widths)
    expected = column_mass(reference, *arguments)
    for block in (2**20, 700):
        monkeypatch.setattr("headwise.kernels.attention._BLOCK_LOGITS", block)
        for mine, its in zip(column_mass(cpu, *arguments), expected, strict=True):
            torch.testing.assert_close(mine, its, atol=2e-5, rtol=2e-5)
    # A band as wide as the prompt holds everything.
    torch.testing.assert_close(expected[1][2], expected[0])


@pairwise(**VECTORS)
def test_column_mass_without_bands_or_rows():
    query, keys, columns, _, weights, positions = mass_inputs(queries=5)
    none = positions.new_zeros(0, 2)
    mass, band = column_mass(cpu, query, keys, columns, None, LogitOptions(0.3), weights, positions, none)
    assert band.shape == (0, *mass.shape)
    torch.testing.assert_close(mass.sum(-1), weights.sum(1)[:, None, None].expand(2, 2, 3))
    nothing = column_mass(
        cpu, query[:, :, :, :0], keys, columns[:0], None, LogitOptions(0.3), weights[:, :0], positions, none
    )
    assert (nothing[0] == 0).all()


def close(found, expected, *, peaks=2e-5, output=1e-5):
    for mine, its, tolerance in zip(found, expected, (output, peaks), strict=True):
        torch.testing.assert_close(mine, its, atol=tolerance, rtol=tolerance)


def repeating(dtype=torch.float32, *, queries, total, pads=(0, 0), group=3):
    """Queries of the newest columns, and what they look at."""
    query, keys = torch.randn(2, 2, group, queries, 24).to(dtype), torch.randn(2, 2, total, 24).to(dtype)
    values = torch.randn(2, 2, total, 15).to(dtype)
    if not any(pads):
        return query, keys, values, None
    real = torch.arange(total)[None] >= torch.tensor(pads)[:, None]
    seen = torch.arange(total) <= torch.arange(total - queries, total)[:, None]
    return query, keys, values, seen & real[:, None] & real[:, -queries:, None]


@pairwise(
    pads=[(0, 0), (0, 50)],
    sizes=[(1, 83, 1), (40, 83, 3), (83, 83, 2)],
    kind=["plain", "softcap", "sinks"],
    dtype=DTYPES,
    **THREADS,
)
def test_attention_and_peaks(pads, sizes, kind, dtype, threads, monkeypatch):
    queries, total, group = sizes
    arguments = repeating(dtype, queries=queries, total=total, pads=pads, group=group)
    options = LogitOptions(0.3, 2.0 if kind == "softcap" else None, torch.randn(2, group) if kind == "sinks" else None)
    counted = [slice(0, 4), slice(9, 30), slice(total - queries, total)] if queries < 50 else [slice(0, total)]
    expected = attention_and_peaks(reference, *arguments, options, counted)
    rounding = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    for block in (2**20, 700):
        monkeypatch.setattr("headwise.kernels.attention._BLOCK_LOGITS", block)
        found = attention_and_peaks(cpu, *arguments, options, counted)
        assert found[0].dtype == dtype
        close(found, expected, output=rounding)


@pairwise(name=["reference", "cpu"], **VECTORS)
def test_peaks_by_hand(name):
    """Logits are logarithms: of the first row 1 1, of the second 1 2 3."""
    keys = torch.tensor([[1.0, 1], [1, 2], [1, 3]]).log()[None, None]
    query = torch.tensor([[1.0, 0], [0, 1]])[None, None, None]
    kernels, options, values = choose(name, CPU), LogitOptions(1.0), torch.eye(3)[None, None]
    output, peaks = attention_and_peaks(kernels, query, keys, values, None, options, [slice(0, 3)])
    torch.testing.assert_close(output[0, 0, 0], torch.tensor([[1 / 2, 1 / 2, 0], [1 / 6, 2 / 6, 3 / 6]]))
    torch.testing.assert_close(peaks, torch.tensor([[[1 / 2, 1 / 2, 3 / 6]]]))
    # A softmax without the middle one leaves the attention as it was.
    some = attention_and_peaks(kernels, query, keys, values, None, options, [slice(0, 1), slice(2, 3)])
    torch.testing.assert_close(some[0], output)
    torch.testing.assert_close(some[1], torch.tensor([[[1.0, 0, 3 / 4]]]))
    # With a sink as heavy as all of them together, half is left.
    options = LogitOptions(1.0, sinks=torch.tensor([[6.0]]).log())
    output, peaks = attention_and_peaks(kernels, query[..., 1:, :], keys, values, None, options, [slice(0, 3)])
    torch.testing.assert_close(output[0, 0, 0], torch.tensor([[1 / 12, 2 / 12, 3 / 12]]))
    torch.testing.assert_close(peaks, torch.tensor([[[1 / 12, 2 / 12, 3 / 12]]]))


@pairwise(name=["reference", "cpu"], **VECTORS)
def test_rows_that_see_nothing_raise_nothing(name):
    query, keys, values = torch.randn(1, 1, 2, 3, 8), torch.randn(1, 1, 5, 8), torch.randn(1, 1, 5, 8)
    mask = torch.ones(1, 3, 5, dtype=torch.bool)
    mask[:, 1] = False
    mask[..., 4] = False
    # A view whose last axis is not dense.
    mask = mask.mT.contiguous().mT
    counted, options = [slice(0, 2), slice(3, 5)], LogitOptions(1.0)
    output, peaks = attention_and_peaks(choose(name, CPU), query, keys, values, mask, options, counted)
    logits = query[0, 0][:, [0, 2]] @ keys[0, 0, :4].T
    torch.testing.assert_close(output[0, 0][:, [0, 2]], logits.softmax(-1) @ values[0, 0, :4])
    assert (output[0, 0, :, 1] == 0).all()
    torch.testing.assert_close(peaks[0, 0, [0, 1, 3]], logits[..., [0, 1, 3]].softmax(-1).amax((0, 1)))
    assert (peaks[0, 0, [2, 4]] == 0).all()


@pairwise(sharpness=[1e-3, 30.0, 1e3], **VECTORS)
def test_peaks_of_flat_and_sharp_attention(sharpness):
    """Also where nothing that counts comes near the largest logit."""
    query, keys, values, _ = repeating(queries=40, total=83)
    arguments = (query * sharpness, keys, values, None, LogitOptions(1.0), [slice(0, 4), slice(43, 83)])
    found, expected = attention_and_peaks(cpu, *arguments), attention_and_peaks(reference, *arguments)
    assert found[1].max() <= 1 + 1e-3
    close(found, expected, peaks=5e-3, output=5e-3)


@pairwise(**THREADS)
def test_reading_a_buffer_sums_its_bits(threads):
    numbers = torch.randint(-100, 100, (1001,))
    assert cpu.read(numbers) == int(numbers.sum())


# Where they cannot run.


def test_unknown_kernels_are_refused_with_the_names_there_are():
    with pytest.raises(headwise.ConfigurationError, match="unknown kernel 'fast'; available: auto, cpu, triton, ref"):
        check_name("fast")
    with pytest.raises(headwise.ConfigurationError, match="unknown kernel"):
        headwise.HeadwiseCache(tiny.llama(), headwise.Full(), kernel="fast")


def test_auto_takes_the_compiled_kernels_on_a_cpu():
    assert choose("auto", CPU).name == "cpu"
    assert headwise.HeadwiseCache(tiny.llama(), headwise.Full()).report().kernel == "cpu"


def test_kernels_that_cannot_run_are_never_replaced_in_silence(monkeypatch):
    model = tiny.llama()
    with monkeypatch.context() as patch:
        patch.setattr(cpu_library, "load", lambda: "they were not compiled")
        patch.delenv("TRITON_INTERPRET")
        with pytest.raises(headwise.ConfigurationError, match="'cpu' kernels cannot run on cpu: they were not comp"):
            choose("cpu", CPU)
        with pytest.warns(HeadwiseWarning, match="plain torch kernels.*they were not compiled"):
            cache = headwise.HeadwiseCache(model, headwise.Full())
        assert cache.report().kernel == "reference"
        # Said once, of a cache and its copies.
        assert copy.deepcopy(cache).report().kernel == "reference"
        # Asked for by name there is nothing to warn of.
        headwise.HeadwiseCache(model, headwise.Full(), kernel="reference")


def test_double_precision_is_for_the_reference_alone():
    assert "float32, bfloat16, float16, not torch.float64" in obstacle("cpu", CPU, torch.float64)
    model = tiny.llama(dtype=torch.float64)
    ids = tiny.prompt(20)
    cache = headwise.HeadwiseCache(model, headwise.Window(7), kernel="reference")
    with torch.no_grad():
        for new in (ids, ids[:, :1], ids[:, 1:2]):
            assert model(input_ids=new, past_key_values=cache).logits.isfinite().all()


def test_the_compiled_kernels_are_for_the_cpu():
    assert obstacle("cpu", torch.device("meta")) == "they are for the CPU"


SCRIPT = Path(cpu.__file__).parent / "csrc" / "compile.py"


def test_the_library_is_that_of_the_sources():
    """What is tested is what was last built."""
    sources = [path for path in SCRIPT.parent.iterdir() if path.suffix in {".h", ".cpp", ".py"}]
    newest = max(path.stat().st_mtime for path in sources)
    assert cpu_library.LIBRARY.stat().st_mtime >= newest, f"build it again: python {SCRIPT.name}"


@pytest.mark.parametrize(("compiler", "message"), [("no-such-compiler", "no-such-compiler"), ("false", "false failed")])
def test_a_compiler_that_is_missing_or_fails_is_named(compiler, message, monkeypatch):
    monkeypatch.setenv("CXX", compiler)
    compile_library = runpy.run_path(str(SCRIPT))["compile_library"]
    before = cpu_library.LIBRARY.stat().st_mtime_ns
    with pytest.raises(RuntimeError, match=message):
        compile_library()
    assert cpu_library.LIBRARY.stat().st_mtime_ns == before


def test_without_a_compiler_the_reason_is_given(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="no C"):
        runpy.run_path(str(SCRIPT))["compile_library"]()


def test_a_library_that_does_not_load_is_an_obstacle(tmp_path):
    broken = tmp_path / cpu_library.LIBRARY.name
    broken.write_bytes(b"not a library")
    program = f"""
import torch
from pathlib import Path
from headwise.kernels.cpu import backend as cpu
from headwise.kernels.cpu import library as cpu_library
cpu_library.LIBRARY = Path({str(broken)!r})
print(cpu.obstacle(torch.device("cpu")))
cpu_library.load.cache_clear()
cpu_library.LIBRARY = Path({str(tmp_path / "none")!r})
print(cpu.obstacle(torch.device("cpu")))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ)
    broken_line, missing_line = done.stdout.splitlines()
    assert broken_line.startswith("the compiled library does not load")
    assert missing_line.startswith("they were not compiled")


@pairwise(**VECTORS)
def test_parallel_calls_from_several_threads_do_not_share_memory():
    from concurrent.futures import ThreadPoolExecutor

    stores = [filled([[n, 2 * n]]) for n in (10, 200, 31, 77)]
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
