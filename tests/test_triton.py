"""The Triton kernels against the reference kernels, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from cases import pairwise, singly
from headwise.kernels import reference
from headwise.kernels.triton import map as kernel_map
from headwise.kernels.triton import tiles
from headwise.kernels.triton.backend import KERNELS as kernels
from headwise.types import LogitOptions
from kernel_calls import append, attention_and_peaks, column_mass, column_max, ragged_decode
from kernel_inputs import content_of
from triton_inputs import SPLITS, assert_same, both, filled, poison, splits, strided

__all__ = ["splits"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# The interpreter cuts bfloat16 off where everybody else rounds.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@singly(
    indirect=["splits"],
    case=[
        (torch.float32, 1, 1, 1, False, False, 64, 64, 16),
        (torch.float32, 2, 3, 5, True, True, 7, 11, 3),
        (torch.bfloat16, 5, 3, 3, False, True, 11, 7, 1),
        (torch.bfloat16, 4, 1, 1, True, False, 20, 20, 16),
        (torch.float16, 3, 1, 2, True, True, 80, 80, 16),
        (torch.float16, 5, 3, 3, False, False, 11, 7, 1),
        (torch.float16, 1, 2, 70, True, False, 16, 32, 3),
    ],
    splits=SPLITS[::-1],
)
def test_decode(case, splits):
    dtype, group, queries, fresh, masked, biased, key_dim, value_dim, page_size = case
    store = filled([[0, 1, 17], [70, 64, 33]], key_dim, value_dim, dtype, page_size, biased=biased)
    found, expected = both(store, group, queries, fresh, masked=masked)
    assert_same(found, expected, TOLERANCE[dtype])
    assert found.output.dtype == dtype
    if masked:
        assert (found.output[0, :, :, 0] == 0).all()
        assert (found.lse[0, :, :, 0] == -torch.inf).all()
        assert (found.on_kept[0, :, 0] == 0).all()


@pytest.mark.parametrize("splits", SPLITS, indirect=True)
def test_decode_without_fresh_rows(splits):
    found, expected = both(filled([[0, 3, 17], [70, 64, 33]], 11, 7), 1, 3, 0, masked=True)
    assert_same(found, expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize(
    ("group", "key_dim", "value_dim", "dtype"),
    [(8, 128, 128, torch.float16), (4, 256, 128, torch.bfloat16), (1, 192, 256, torch.float16)],
    ids=str,
)
def test_decode_with_large_heads(group, key_dim, value_dim, dtype):
    found, expected = both(filled([[5, 70]], key_dim, value_dim, dtype), group, 1, 1)
    assert_same(found, expected, TOLERANCE[dtype])


@pairwise(
    indirect=["splits"],
    masked=[False, True],
    kind=["soft cap", "sinks"],
    biased=[True, False],
    with_mass=[True, False],
    splits=SPLITS,
)
def test_decode_with_soft_cap_and_sinks(kind, masked, biased, with_mass, splits):
    store = filled([[0, 3], [40, 35]], 11, 7, biased=biased)
    options = LogitOptions(0.7, softcap=1.5) if kind == "soft cap" else LogitOptions(0.3, sinks=torch.randn(2, 3))
    found, expected = both(store, 3, 2, 3, masked=masked, options=options, with_mass=with_mass)
    assert_same(found, expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_more_query_rows_than_a_program_takes(dtype):
    found, expected = both(filled([[9], [40]], 16, 16, dtype), 4, 19, 21)
    assert_same(found, expected, TOLERANCE[dtype])


def test_more_splits_than_are_merged_at_once(monkeypatch):
    monkeypatch.setattr(tiles, "_PROGRAMS", 1000)
    found, expected = both(filled([[1200, 40]], 8, 8), 2, 1, 1, options=LogitOptions(2.0))
    assert_same(found, expected, TOLERANCE[torch.float32])


def test_large_logits_stay_finite():
    store = filled([[3, 40]], 16, 16)
    found, expected = both(store, 2, 1, 1, options=LogitOptions(90.0))
    assert_same(found, expected, 1e-3)
    assert found.lse.max() > 300


@pytest.mark.parametrize("with_mass", [False, True])
def test_a_store_without_rows_leaves_the_fresh_ones(with_mass):
    for page_size in (16, 3):
        store = filled([[0, 0]], 11, 7, page_size=page_size)
        found, expected = both(store, 2, 2, 2, with_mass=with_mass)
        assert_same(found, expected, 1e-5)
        assert found.on_kept is None or found.on_kept.shape == (1, 2, 2, 0)


def test_a_query_of_another_dtype_than_the_pages():
    store = filled([[3, 40]], 16, 16, torch.float16)
    query, fresh = torch.randn(1, 2, 2, 1, 16), torch.randn(1, 2, 1, 16).half()
    arguments = (query, [store.view()], fresh, fresh, None, LogitOptions(0.25))
    found, expected = (ragged_decode(one, *arguments, with_mass=True) for one in (kernels, reference))
    assert_same(found, expected, TOLERANCE[torch.float16])


# Appending.


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("fresh", "page_size", "scored", "increments", "biased", "real"),
    [
        (1, 16, False, False, False, False),
        (1, 16, True, True, True, False),
        (3, 1, True, False, False, True),
        (7, 3, True, True, False, True),
        (20, 3, False, False, True, True),
        (37, 16, True, True, True, False),
    ],
)
def test_append(fresh, page_size, scored, increments, biased, real, dtype):
    before = [[5, 1, 17], [0, 48, 33]]
    arguments = (
        strided(2, 3, fresh, 11, dtype=dtype),
        strided(2, 3, fresh, 7, dtype=dtype),
        torch.arange(100, 100 + fresh),
        (torch.rand(fresh, 2) < 0.6).T if real else None,
        torch.rand(2, 3, fresh + 2)[:, :, 2:] if scored else None,
    )
    # As wide as the longest head, and undefined beyond each one's length.
    more = poison(2, 3, 48 + 5)[:, :, :48].where(torch.arange(48) >= torch.tensor(before)[:, :, None], torch.rand(48))
    results = []
    for one in (kernels, reference):
        torch.manual_seed(1)
        store = filled(before, 11, 7, dtype, page_size, scored, biased)
        store.pages.reserve(fresh)
        assert append(one, store.view(), *arguments, more if increments else None) is None
        store.pages.longest += fresh
        results.append(content_of(store))
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)
    assert int(results[0][0].max()) > 48


def test_increments_take_several_programs():
    lengths = [[1030, 5]]
    more = torch.rand(1, 2, 1030)
    results = []
    for one in (kernels, reference):
        torch.manual_seed(1)
        store = filled(lengths, 2, 2, scored=True)
        append(
            one,
            store.view(),
            poison(1, 2, 0, 2),
            poison(1, 2, 0, 2),
            torch.zeros(0).long(),
            None,
            poison(1, 2, 0),
            more,
        )
        results.append(content_of(store))
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


def test_append_and_decode_take_turns():
    """A store that the kernels fill says the same as one that the reference fills."""
    stores = []
    for one in (kernels, reference):
        torch.manual_seed(1)
        store = filled([[0, 14], [3, 30]], 8, 8, scored=True, biased=True)
        scores = torch.zeros(2, 2, 1)
        for column in range(60, 64):
            query, keys, values = torch.randn(2, 2, 2, 1, 8), torch.randn(2, 2, 1, 8), torch.randn(2, 2, 1, 8)
            result = ragged_decode(one, query, [store.view()], keys, values, None, LogitOptions(0.3), with_mass=True)
            store.pages.reserve(1)
            on_kept = result.on_kept[:, :, 0]
            append(
                one,
                store.view(),
                keys,
                values,
                torch.tensor([column]),
                None,
                scores + result.on_fresh[:, :, 0],
                on_kept,
            )
            store.pages.longest += 1
        stores.append(content_of(store))
    for found, expected in zip(*stores, strict=True):
        torch.testing.assert_close(found, expected)


# The profile.


@pytest.mark.parametrize(
    ("dtype", "heads", "group", "key_dim", "masked", "bands", "sampled", "softcap", "sinks"),
    [
        (torch.float32, 2, 3, 13, False, 1, False, None, False),
        (torch.float32, 1, 2, 20, True, 2, False, 2.0, True),
        (torch.bfloat16, 1, 2, 16, False, 2, True, None, True),
        (torch.float16, 2, 3, 80, False, 3, True, None, True),
        (torch.float16, 3, 2, 64, True, 0, False, 30.0, False),
    ],
    ids=str,
)
def test_column_mass(dtype, heads, group, key_dim, masked, bands, sampled, softcap, sinks):
    batch, total = 2, 100
    pads = torch.tensor([0, 21]) if masked else torch.zeros(2, dtype=torch.long)
    real = torch.arange(total) >= pads[:, None]
    positions = (real.cumsum(1) - 1).clamp(min=0)
    columns = torch.arange(30, total)
    if sampled:
        columns = columns[torch.rand(len(columns)) < 0.4]
    mask = None
    if masked:
        everything = torch.ones(total, total, dtype=torch.bool).tril() & real[:, None] & real[:, :, None]
        mask = everything[:, columns]
    weights = torch.rand(batch, total)[:, columns] * real[:, columns]
    options = LogitOptions(0.4, softcap, torch.randn(heads, group) if sinks else None)
    query, keys = (
        strided(batch, heads, group, len(columns), key_dim, dtype=dtype),
        strided(batch, heads, total, key_dim),
    )
    widths = torch.tensor([[20, 7], [1, 60], [100, 33]])[:bands]
    arguments = (query, keys.to(dtype), columns, mask, options, weights, positions, widths)
    (mass, band), (expected_mass, expected_band) = (column_mass(one, *arguments) for one in (kernels, reference))
    assert expected_mass.sum() > 1
    torch.testing.assert_close(mass, expected_mass, atol=2e-5, rtol=2e-4)
    torch.testing.assert_close(band, expected_band, atol=2e-5, rtol=2e-4)
    best, expected_best = (column_max(one, *arguments[:5]) for one in (kernel_map, reference))
    assert expected_best.shape == best.shape == (batch, heads, total)
    torch.testing.assert_close(best, expected_best, atol=2e-5, rtol=2e-4)


def test_rows_that_see_nothing_give_nothing():
    query, keys = torch.randn(1, 1, 1, 4, 8), torch.randn(1, 1, 6, 8)
    mask = torch.ones(1, 4, 6, dtype=torch.bool).tril(2)
    mask[:, 1] = False
    weights = torch.ones(1, 4)
    rest = (columns, positions, widths) = torch.arange(2, 6), torch.arange(6)[None], torch.tensor([[3]])
    mass, band = column_mass(kernels, query, keys, columns, mask, LogitOptions(1.0), weights, positions, widths)
    weights[0, 1] = 0
    expected, inside = column_mass(reference, query, keys, rest[0], mask, LogitOptions(1.0), weights, *rest[1:])
    torch.testing.assert_close(mass, expected)
    torch.testing.assert_close(band, inside)
    best = column_max(kernel_map, query, keys, columns, mask, LogitOptions(1.0))
    torch.testing.assert_close(best, column_max(reference, query, keys, columns, mask, LogitOptions(1.0)))


def test_attention_and_peaks():
    query, keys, values = strided(2, 2, 3, 30, 20), strided(2, 2, 100, 20), strided(2, 2, 100, 9)
    arguments = (query, keys, values, None, LogitOptions(0.4), [slice(0, 4), slice(20, 50), slice(70, 100)])
    for found, expected in zip(
        attention_and_peaks(kernels, *arguments), attention_and_peaks(reference, *arguments), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
