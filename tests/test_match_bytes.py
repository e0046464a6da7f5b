"""Bytes of matched caches: biases counted, and read by all kernels; none where none are needed."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from headwise import Match, Quantized, SnapKV
from headwise.kernels.backends import choose
from headwise.kernels.interface import DecodeRequest
from headwise.matching.targets import HeadRows, squared_error
from headwise.quant.formats import Precision, RowFormat
from headwise.stages import compact, match
from headwise.stages.match import match_rows
from headwise.store.rows import Rows
from headwise.store.store import RowStore
from headwise.types import LogitOptions
from matched import IDS, PROMPT, SNAP, answers, read, stores

BIASED = pytest.mark.parametrize("inner", [SNAP, Quantized(SNAP, recent=4)], ids=str)


def test_values_alone_take_no_byte():
    plain, matched = read(SNAP).report(), read(Match(SNAP, bias=False)).report()
    assert matched.used_bytes == plain.used_bytes
    # What is reported of it lies beside the rows.
    told = sum(errors.nbytes for errors in matched.matched)
    assert matched.allocated_bytes - told == plain.allocated_bytes
    coded, fitted = (
        read(p).report() for p in (Quantized(SNAP, recent=4), Match(Quantized(SNAP, recent=4), bias=False))
    )
    assert fitted.used_bytes == coded.used_bytes


@BIASED
def test_a_bias_takes_two_bytes_of_every_row_and_none_where_no_row_has_one(inner):
    plain, matched = read(inner), read(Match(inner))
    rows = sum(int(layer.core.store.lengths.sum()) for layer in plain.headwise_layers)
    assert matched.report().used_bytes == plain.report().used_bytes + 2 * rows
    for before, after in zip(stores(plain), stores(matched), strict=True):
        assert before.biases is None and after.biases[after.keep].abs().max() > 0.01
    assert all(rows.biases is None for rows in stores(read(Match(SnapKV(keep=200)))))


def test_a_budget_of_bytes_has_room_for_biases():
    used = [read(policy, budget="40kB").report().used_bytes for policy in (SNAP, Match(SNAP))]
    rows = [
        int(sum(layer.core.store.lengths.sum() for layer in read(p, budget="40kB").headwise_layers))
        for p in (SNAP, Match(SNAP))
    ]
    assert all(38_000 < bytes <= 40_000 for bytes in used) and rows[1] < rows[0]


@BIASED
def test_biases_are_read_by_all_kernels_and_rows_that_come_have_none(inner):
    policy = Match(inner)
    found, plain = read(policy), read(policy, kernel="reference")
    ids, without = IDS[:, PROMPT:], read(policy)
    for layer in without.headwise_layers:
        for pool in layer.core.store._pools:
            pool.pools["biases"].zero_()
    assert not torch.allclose(answers(copy.deepcopy(found), ids[:, :3]), answers(without, ids[:, :3]), atol=1e-3)
    before = stores(found)
    torch.testing.assert_close(answers(found), answers(plain), atol=1e-4, rtol=1e-4)
    for old, rows in zip(before, stores(found), strict=True):
        came = rows.columns >= PROMPT
        assert int((came & rows.keep).sum()) == 2 * ids.shape[1]
        assert not rows.biases[came & rows.keep].any()
        for head in range(2):
            mine, its = (
                {
                    int(c): float(x)
                    for c, x in zip(
                        r.columns[0, head][r.keep[0, head]], r.biases[0, head][r.keep[0, head]], strict=True
                    )
                }
                for r in (old, rows)
            )
            assert mine == {column: bias for column, bias in its.items() if column < PROMPT}


@pytest.mark.parametrize("precision", [None, Precision((RowFormat(8, 8),), recent=4, sinks=1)], ids=["exact", "coded"])
def test_kernels_that_have_read_rows_before_see_a_bias_given_later(precision):
    """What compiled code is told of pages is remembered as long as their tensors are the same."""
    keys, values = torch.randn(2, 1, 2, 30, 8)
    keep = torch.rand(1, 2, 30) < 0.8
    columns = torch.arange(30, dtype=torch.int32).expand(1, 2, -1)
    rows = Rows.of(keys, values, columns, None, keep)
    store = RowStore(rows, page_size=4, scored=False, precision=precision)
    store.fill(rows)
    query, fresh = torch.randn(1, 2, 3, 1, 8), torch.randn(1, 2, 1, 8)

    def found(name):
        kernels = choose(name, torch.device("cpu"))
        request = DecodeRequest(query, store.view(), fresh, fresh, None, LogitOptions(0.3), True)
        return kernels.ragged_decode(request).output

    before = found("cpu")
    store.bias(2 * torch.rand(store.occupied().shape) - 1)
    torch.testing.assert_close(found("cpu"), found("reference"), atol=1e-5, rtol=1e-5)
    assert (found("cpu") - before).abs().max() > 0.01


@BIASED
def test_the_error_that_is_reported_is_that_of_rows_as_they_are_stored(inner, monkeypatch):
    seen = []
    monkeypatch.setattr(compact, "match_rows", lambda *given: seen.append((given, match_rows(*given))) or seen[-1][1])
    read(Match(inner))
    for (store, targets, *_), errors in seen:
        rows = store.rows()
        for (b, h), head in targets.items():
            keep = rows.keep[b, h]
            parts = (part[b, h][keep].float() for part in (rows.keys, rows.values, rows.biases))
            test = head.at_most(1024).split()[1]
            expected = (squared_error(test, HeadRows(*parts)) / test.size).sqrt()
            torch.testing.assert_close(errors[1, b, h], expected, atol=1e-4, rtol=1e-3)
            assert errors[1, b, h] < errors[0, b, h]


@BIASED
def test_heads_that_the_fit_would_harm_keep_their_own_values_without_biases(inner, monkeypatch):
    good, harmed = match.fitted, []

    def bad(targets, rows, *others):
        mended = good(targets, rows, *others)
        harmed.append(len(harmed) % 3 == 0)
        return replace(mended, values=-4 * mended.values, biases=mended.biases + 1) if harmed[-1] else mended

    plain = stores(read(inner))
    monkeypatch.setattr(match, "fitted", bad)
    cache = read(Match(inner))
    own = [layer.core.plan.matched[0] == layer.core.plan.matched[1] for layer in cache.headwise_layers]
    assert torch.cat([each.flatten() for each in own]).tolist() == harmed
    for before, after, kept in zip(plain, stores(cache), own, strict=True):
        rows = after.keep & kept[..., None]
        assert torch.equal(after.values[rows], before.values[rows]) and not after.biases[rows].any()
        assert after.biases[after.keep & ~kept[..., None]].any()
