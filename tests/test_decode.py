"""The decode stage with every kernel against plain attention, head by head."""

from __future__ import annotations

import pytest
import torch

from cases import EVERYTHING, pairwise
from headwise.kernels.interface import DecodeRequest
from headwise.quant.formats import Precision, RowFormat
from headwise.stages.decode import decode
from headwise.store.rows import Rows
from headwise.store.store import RowStore
from headwise.types import LogitOptions

B, H, D, E = 2, 3, 11, 7
LENGTHS = torch.tensor([[0, 1, 17], [5, 16, 33]])


def filled(dtype=torch.float32, page_size=4, lengths=LENGTHS):
    """A store with those lengths, and its content per head in order of column; columns have gaps."""
    longest = int(lengths.max())
    keys, values = torch.randn(B, H, longest, D).to(dtype), torch.randn(B, H, longest, E).to(dtype)
    columns = (torch.arange(longest) * 2).expand(B, H, -1)
    rows = Rows.of(keys, values, columns, None, torch.arange(longest) < lengths[:, :, None])
    store = RowStore(rows, page_size=page_size, scored=False)
    store.commit(store.occupied(), rows)
    return store, keys, values


def by_hand(query, keys, values, visible, options):
    """One query row of one query head over the rows it may see."""
    logits = keys.double() @ query.double() * options.scaling
    if options.softcap is not None:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    weights = logits[visible].exp()
    total = weights.sum()
    return weights, values.double()[visible], total


# The compiled kernels are held against the reference elsewhere (tests/test_cpu_kernels.py).
@pairwise(
    indirect=["kernels"],
    group=[1, 2, 5],
    queries=[1, 3],
    masked=[False, True],
    kind=["plain", "softcap", "sinks"],
    dtype=[torch.float32, torch.bfloat16, torch.float16],
    kernels=["reference", "cpu"] if EVERYTHING else ["reference"],
)
def test_decode_equals_attention_by_hand(group, queries, masked, kind, dtype, kernels):
    store, keys, values = filled(dtype)
    fresh = queries + 2  # two rows that came before and are not stored yet
    seen = 2 * int(LENGTHS.max()) + fresh
    query = torch.randn(B, H, group, queries, D).to(dtype)
    fresh_keys, fresh_values = torch.randn(B, H, fresh, D).to(dtype), torch.randn(B, H, fresh, E).to(dtype)
    sinks = torch.randn(H, group) if kind == "sinks" else None
    options = LogitOptions(0.4, softcap=1.5 if kind == "softcap" else None, sinks=sinks)
    mask = None
    if masked:
        mask = torch.rand(B, queries, seen) < 0.7
        mask[:, :, -fresh:] &= torch.ones(queries, fresh, dtype=torch.bool).tril(2)
        mask[:, torch.arange(queries), seen - queries + torch.arange(queries)] = True
    result = decode(DecodeRequest(query, store.view(), fresh_keys, fresh_values, mask, options, True), kernels)

    assert result.output.dtype == dtype
    for b in range(B):
        for h in range(H):
            n = int(LENGTHS[b, h])
            order = store.kept_columns()[b, h, :n] // 2
            for q in range(queries):
                on_rows = torch.zeros(n + fresh, dtype=torch.float64)
                for g in range(group):
                    k = torch.cat([keys[b, h, :n], fresh_keys[b, h]])
                    v = torch.cat([values[b, h, :n], fresh_values[b, h]])
                    visible = torch.ones(n + fresh, dtype=torch.bool)
                    visible[n + fresh - queries + q + 1 :] = False
                    if mask is not None:
                        at = torch.cat([torch.arange(n) * 2, torch.arange(seen - fresh, seen)])
                        visible = mask[b, q, at]
                    weights, seen_values, total = by_hand(query[b, h, g, q], k, v, visible, options)
                    if sinks is not None:
                        total = total + sinks[h, g].double().exp()
                    expected = (weights[:, None] * seen_values).sum(0) / total
                    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
                    torch.testing.assert_close(
                        result.output[b, h, g, q].double(), expected, atol=tolerance, rtol=tolerance
                    )
                    on_rows[visible] += weights / total
                torch.testing.assert_close(
                    result.on_kept[b, h, q, :n].double(), on_rows[:n][order], atol=1e-4, rtol=1e-3
                )
                assert (result.on_kept[b, h, q, n:] == 0).all()
                torch.testing.assert_close(result.on_fresh[b, h, q].double(), on_rows[n:], atol=1e-4, rtol=1e-3)


def test_blocks_of_queries_give_what_one_block_gives(monkeypatch, kernels):
    store, *_ = filled()
    query, fresh_keys, fresh_values = torch.randn(B, H, 2, 9, D), torch.randn(B, H, 9, D), torch.randn(B, H, 9, E)

    def run():
        return decode(
            DecodeRequest(query, store.view(), fresh_keys, fresh_values, None, LogitOptions(0.3), True), kernels
        )

    whole = run()
    monkeypatch.setattr("headwise.kernels.attention._BLOCK_LOGITS", 700)
    parts = run()
    torch.testing.assert_close(whole.output, parts.output)
    torch.testing.assert_close(whole.lse, parts.lse)
    torch.testing.assert_close(whole.on_kept, parts.on_kept)
    torch.testing.assert_close(whole.on_fresh, parts.on_fresh)


def test_an_empty_store_leaves_the_fresh_rows(kernels):
    store, *_ = filled(lengths=torch.zeros(B, H, dtype=torch.long))
    value = torch.randn(B, H, 1, E)
    query, key = torch.randn(B, H, 2, 1, D), torch.randn(B, H, 1, D)
    result = decode(DecodeRequest(query, store.view(), key, value, None, LogitOptions(1.0)), kernels)
    torch.testing.assert_close(result.output, value[:, :, None].expand(B, H, 2, 1, E))
    assert result.on_kept is None


@pytest.mark.parametrize("precision", [None, Precision((RowFormat(8, 8),), 4, 0, 0)])
def test_scores_are_added_where_padding_had_been_counted_for_rows(precision, kernels):
    """Nobody knows how few of the columns of a pass are real until pages are taken anew."""
    held = 5 if precision else 0
    rows = Rows.of(
        *torch.randn(2, 1, 1, held, 4),
        torch.arange(held).expand(1, 1, -1),
        torch.zeros(1, 1, held),
        torch.ones(1, 1, held, dtype=torch.bool),
    )
    store = RowStore(rows, page_size=1, scored=True, precision=precision)
    store.fill(rows)

    def append(columns, real, increments):
        new = torch.randn(2, 1, 1, len(columns), 4)
        store.append(*new, columns, real, torch.zeros(1, 1, len(columns)), increments, kernels)

    padded = torch.arange(held, held + 9)
    append(padded, (padded == held)[None], None)
    increments = torch.arange(1.0, store.longest + 1).expand(1, 1, -1)
    there, columns = store.occupied(), store.kept_columns()
    expected = dict(zip(columns[there].tolist(), increments[there].tolist(), strict=True))
    append(torch.tensor([held + 9]), None, increments)
    there = store.occupied()
    found = dict(zip(store.kept_columns()[there].tolist(), store.kept_scores()[there].tolist(), strict=True))
    assert found == {**expected, held + 9: 0.0}
