"""The compiled CPU kernels of whole prompts against the reference: mass of columns, attention and its peaks."""

from __future__ import annotations

import pytest
import torch

from cases import pairwise
from cpu_inputs import CPU, DTYPES, THREADS, VECTORS, threads, vectors
from headwise.kernels import reference
from headwise.kernels.backends import choose
from headwise.kernels.cpu import backend as cpu
from headwise.kernels.interface import AttentionMap, MassRequest
from headwise.types import LogitOptions
from kernel_calls import attention_and_peaks, column_mass
from kernel_inputs import some_marks, strided

__all__ = ["threads", "vectors"]

# Of outputs, by the type of the rows.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


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
def test_column_mass(pads, queries, kind, dtype, threads):
    query, keys, columns, mask, weights, positions = mass_inputs(dtype, queries=queries, pads=pads)
    options = LogitOptions(0.3, 2.0 if kind == "softcap" else None, torch.randn(2, 3) if kind == "sinks" else None)
    widths = torch.tensor([[20, 7], [1, 60], [200, 200]])
    arguments = (query, keys, columns, mask, options, weights, positions, widths)
    expected = column_mass(reference, *arguments)
    for mine, its in zip(column_mass(cpu.KERNELS, *arguments), expected, strict=True):
        torch.testing.assert_close(mine, its, atol=2e-5, rtol=2e-5)
    # A band as wide as the prompt holds everything.
    torch.testing.assert_close(expected[1][2], expected[0])


@pairwise(**VECTORS)
def test_column_mass_without_bands_or_rows():
    query, keys, columns, _, weights, positions = mass_inputs(queries=5)
    none = positions.new_zeros(0, 2)
    mass, band = column_mass(cpu.KERNELS, query, keys, columns, None, LogitOptions(0.3), weights, positions, none)
    assert band.shape == (0, *mass.shape)
    torch.testing.assert_close(mass.sum(-1), weights.sum(1)[:, None, None].expand(2, 2, 3))
    nothing = column_mass(
        cpu.KERNELS, query[:, :, :, :0], keys, columns[:0], None, LogitOptions(0.3), weights[:, :0], positions, none
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
def test_attention_and_peaks(pads, sizes, kind, dtype, threads):
    queries, total, group = sizes
    arguments = repeating(dtype, queries=queries, total=total, pads=pads, group=group)
    options = LogitOptions(0.3, 2.0 if kind == "softcap" else None, torch.randn(2, group) if kind == "sinks" else None)
    counted = [slice(0, 4), slice(9, 30), slice(total - queries, total)] if queries < 50 else [slice(0, total)]
    expected = attention_and_peaks(reference, *arguments, options, counted)
    found = attention_and_peaks(cpu.KERNELS, *arguments, options, counted)
    assert found[0].dtype == dtype
    close(found, expected, output=ROUNDING[dtype])


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
    found, expected = attention_and_peaks(cpu.KERNELS, *arguments), attention_and_peaks(reference, *arguments)
    assert found[1].max() <= 1 + 1e-3
    close(found, expected, peaks=5e-3, output=5e-3)


# Heads with more and with fewer queries than a block has, as many keys as make several blocks of each, and what is left
# of tiles of six rows: none to five.
SHAPES = [
    (1, 300, 300, 24, 24),
    (3, 83, 300, 40, 15),
    (7, 61, 61, 64, 64),
    (100, 5, 90, 8, 33),
    (2, 1, 130, 7, 1),
    (5, 1, 40, 9, 17),
]


@pairwise(
    shape=SHAPES,
    seen=["causal", "padded", "any", "nothing"],
    kind=["plain", "softcap", "sinks", "marks"],
    dtype=DTYPES,
    bands=[0, 2],
    **THREADS,
)
def test_attention_and_mass(shape, seen, kind, dtype, bands, threads):
    """Both from the same products, as the reference has them one after the other."""
    group, queries, total, key_dim, value_dim = shape
    query, keys = strided(2, 2, group, queries, key_dim, dtype=dtype), strided(2, 2, total, key_dim, dtype=dtype)
    values = strided(2, 2, total, value_dim, dtype=dtype)
    options = LogitOptions(0.3, 2.0 if kind == "softcap" else None, torch.randn(2, group) if kind == "sinks" else None)
    marks = some_marks(2, 2, group, queries, total) if kind == "marks" else None
    map = AttentionMap(query, keys, mask_of(seen, queries, total), options, marks=marks)
    weights = torch.rand(2, queries) * (torch.rand(2, queries) < 0.7)
    request = MassRequest(map, weights, torch.arange(total).expand(2, -1), torch.tensor([[9, 70], [100, 1]])[:bands])
    expected, found = (k.attention_and_mass(request, values) for k in (reference.KERNELS, cpu.KERNELS))
    assert found[0].dtype is dtype
    torch.testing.assert_close(found[0], expected[0], atol=ROUNDING[dtype], rtol=ROUNDING[dtype])
    for mine, its in zip(found[1:], expected[1:], strict=True):
        assert mine.shape == its.shape
        torch.testing.assert_close(mine, its, atol=2e-5, rtol=2e-5)
    # The output does not depend on what else is asked for.
    assert torch.equal(cpu.KERNELS.attention(map, values), found[0])


def mask_of(seen, queries, total):
    """Who sees what: everybody what came before, what is no padding, anything at all, or some of them nothing."""
    if seen == "causal":
        return None
    mask = torch.ones(2, queries, total, dtype=torch.bool).tril(total - queries)
    if seen == "padded":
        mask[0, :, : total // 3] = False
    else:
        mask = torch.rand(2, queries, total) < 0.5
    if seen == "nothing":
        mask[:, ::2] = False
    return mask


@pairwise(**THREADS)
def test_the_same_again_whoever_was_faster(threads):
    """Sums stand apart by part, not by thread: to the last bit the same, call by call."""
    query, keys, values = torch.randn(1, 2, 3, 200, 32), torch.randn(1, 2, 200, 32), torch.randn(1, 2, 200, 32)
    map, widths = AttentionMap(query, keys, None, LogitOptions(0.2)), torch.tensor([[50]])
    request = MassRequest(map, torch.rand(1, 200), torch.arange(200)[None], widths)
    first = cpu.KERNELS.attention_and_mass(request, values)
    for _ in range(20):
        for mine, its in zip(cpu.KERNELS.attention_and_mass(request, values), first, strict=True):
            assert torch.equal(mine, its)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pairwise(rows=[5, 70], **VECTORS)
def test_a_prompt_row_that_is_no_number_makes_no_answer(rows, wrong):
    """It is not hidden: zeros would be an answer."""
    query, keys, values = torch.randn(1, 2, 3, rows, 8), torch.randn(1, 2, rows, 8), torch.randn(1, 2, rows, 6)
    query[0, 1, 2, 3, 4] = wrong
    found = cpu.KERNELS.attention(AttentionMap(query, keys, None, LogitOptions(0.3)), values)
    finite = found.isfinite().all(dim=-1)
    assert finite.sum() == finite.numel() - 1
    assert not finite[0, 1, 2, 3]
