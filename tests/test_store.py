"""The paged store: what it says it holds is what was put in; no page has two owners; memory comes back."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from headwise.store.rows import Rows
from kernel_calls import new_pool, pool_like

KEY_DIM, VALUE_DIM = 3, 5


def new_store(batch, heads, page_size, scored=True):
    sizes = {"batch": batch, "heads": heads, "key_dim": KEY_DIM, "value_dim": VALUE_DIM}
    return new_pool(**sizes, dtype=torch.float32, page_size=page_size, scored=scored)


def rows_with_ids(ids, keep, scored=True):
    """Rows whose whole content says which token they are."""
    number = ids.float()
    keys = number[..., None] + torch.arange(KEY_DIM) / 10
    values = -number[..., None] - torch.arange(VALUE_DIM) / 10
    return Rows.of(keys, values, ids, number / 7 if scored else None, keep)


def contents(store):
    """What every head holds: {token: (key, value, score)}; checks that each row agrees with itself."""
    rows = store.rows()
    assert int(rows.keep.sum()) == int(store.lengths.sum())
    held = []
    for b in range(rows.keep.shape[0]):
        for h in range(rows.keep.shape[1]):
            mine = {}
            for i in rows.keep[b, h].nonzero().flatten().tolist():
                token = int(rows.columns[b, h, i])
                assert token not in mine
                expected = rows_with_ids(torch.tensor([[[token]]]), torch.ones(1, 1, 1, dtype=torch.bool))
                torch.testing.assert_close(rows.keys[b, h, i], expected.keys[0, 0, 0])
                torch.testing.assert_close(rows.values[b, h, i], expected.values[0, 0, 0])
                mine[token] = None if rows.scores is None else float(rows.scores[b, h, i])
            held.append(mine)
    return held


def check_pages(store):
    """Every page has one owner or is free, heads own no more than they need, and slack is small."""
    owned = store.pages.entries[store.pages.entries >= 0].tolist()
    assert len(set(owned)) == len(owned)
    assert not set(owned) & set(store.pages._free)
    assert sorted([*owned, *store.pages._free]) == list(range(len(store.pools["keys"])))
    needed = [math.ceil(n / store.page_size) for n in store.lengths.flatten().tolist()]
    assert (store.pages.entries >= 0).sum(-1).flatten().tolist() == needed
    assert len(store.pools["keys"]) <= sum(needed) + 2 * math.ceil(sum(needed) / 48)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_store_holds_what_was_put_in(data):
    batch, heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    store = new_store(batch, heads, data.draw(st.sampled_from([1, 3, 4, 16])))
    model = [{} for _ in range(batch * heads)]
    token = 0
    seed = data.draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    for step in range(data.draw(st.integers(1, 8))):
        action = data.draw(st.sampled_from(["commit", "commit", "commit", "select", "score"]))
        if action == "commit" or step == 0:
            count = data.draw(st.sampled_from([0, 1, 1, 2, 7, 40]))
            share = data.draw(st.sampled_from([0.0, 0.2, 0.9, 1.0]))
            keep = torch.rand(batch, heads, store.longest, generator=generator) < share
            ids = torch.arange(token, token + count).expand(batch, heads, -1)
            new = rows_with_ids(ids, torch.rand(batch, heads, count, generator=generator) < 0.7)
            columns, named = store.kept("columns"), keep & store.occupied()
            for lane, mine in enumerate(model):
                b, h = divmod(lane, heads)
                survivors = {int(c) for c, k in zip(columns[b, h], named[b, h], strict=True) if k}
                for gone in set(mine) - survivors:
                    del mine[gone]
                for i in range(count):
                    if new.keep[b, h, i]:
                        mine[token + i] = (token + i) / 7
            store.commit(keep, new)
            token += count
        elif action == "score":
            increments = torch.rand(batch, heads, store.longest, generator=generator)
            columns, occupied = store.kept("columns"), store.occupied()
            for lane, mine in enumerate(model):
                b, h = divmod(lane, heads)
                for c, o, more in zip(columns[b, h], occupied[b, h], increments[b, h], strict=True):
                    if o:
                        mine[int(c)] += float(more)
            store.add_scores(increments)
        else:
            chosen = data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=4))
            store.select(torch.tensor(chosen))
            model = [dict(model[b * heads + h]) for b in chosen for h in range(heads)]
            batch = len(chosen)
        held = contents(store)
        assert [set(mine) for mine in held] == [set(mine) for mine in model]
        for mine, expected in zip(held, model, strict=True):
            for number, score in expected.items():
                assert mine[number] == pytest.approx(score, rel=1e-5, abs=1e-5)
        check_pages(store)


def everything(batch, heads, count, start=0):
    ids = torch.arange(start, start + count).expand(batch, heads, -1)
    return rows_with_ids(ids, torch.ones(batch, heads, count, dtype=torch.bool))


def test_bytes_are_those_of_the_tensors():
    store = new_store(2, 3, page_size=4)
    store.commit(store.occupied(), everything(2, 3, 10))
    row = (KEY_DIM + VALUE_DIM) * 4 + 4 + 4
    assert store.row_bytes == row
    assert store.used_bytes == 2 * 3 * 10 * row
    # 10 rows need 3 pages of 4; a first filling has no slack.
    pools = 2 * 3 * 3 * 4 * row
    assert sum(t.untyped_storage().nbytes() for t in store.tensors()) == pools + 2 * 3 * 3 * 4 + 2 * 3 * 8


def test_evicting_gives_memory_back():
    store = new_store(1, 2, page_size=4)
    store.commit(store.occupied(), everything(1, 2, 400))
    before = sum(t.untyped_storage().nbytes() for t in store.tensors())
    keep = store.occupied()
    keep[:, 0, 40:] = False
    store.commit(keep, everything(1, 2, 0))
    after = sum(t.untyped_storage().nbytes() for t in store.tensors())
    assert after < 0.6 * before
    assert store.lengths.tolist() == [[40, 400]]


def test_a_sliding_window_moves_one_row_and_allocates_nothing():
    store = new_store(1, 1, page_size=4)
    store.commit(store.occupied(), everything(1, 1, 8))
    address = store.pools["keys"].data_ptr()
    for token in range(8, 40):
        keep = store.kept("columns") > token - 8
        before = store.pools["columns"].clone()
        store.commit(keep, everything(1, 1, 1, start=token))
        assert store.pools["keys"].data_ptr() == address
        assert int((store.pools["columns"] != before).sum()) == 1
    assert set(contents(store)[0]) == set(range(32, 40))


def test_selecting_a_permutation_copies_no_page():
    store = new_store(3, 2, page_size=4)
    store.commit(store.occupied(), everything(3, 2, 9))
    address, pages = store.pools["keys"].data_ptr(), store.pages.entries.clone()
    store.select(torch.tensor([2, 0, 1]))
    assert store.pools["keys"].data_ptr() == address
    assert torch.equal(store.pages.entries, pages[[2, 0, 1]])


def test_an_empty_head_costs_no_page():
    store = new_store(1, 2, page_size=4)
    new = everything(1, 2, 5)
    new.keep[0, 1] = False
    store.commit(store.occupied(), new)
    assert store.lengths.tolist() == [[5, 0]]
    assert (store.pages.entries[0, 1] >= 0).sum() == 0
    check_pages(store)


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_the_first_filling_equals_a_commit(share, page_size, scored):
    generator = torch.Generator().manual_seed(5)
    keep = torch.rand(3, 2, 37, generator=generator) < share
    keep[1, 0], keep[2, 1] = True, False
    ids = torch.arange(37).expand(3, 2, -1)
    filled, committed = (new_store(3, 2, page_size, scored) for _ in range(2))
    filled.fill(rows_with_ids(ids, keep, scored))
    committed.commit(committed.occupied(), rows_with_ids(ids, keep, scored))
    assert contents(filled) == contents(committed)
    assert torch.equal(filled.lengths, committed.lengths)
    assert filled.longest == committed.longest
    check_pages(filled)
    # It goes on like any other store.
    filled.commit(filled.occupied() & (filled.kept("columns") % 2 == 0), everything(3, 2, 5, start=100))
    for head, before in zip(contents(filled), contents(committed), strict=True):
        assert set(head) == {c for c in before if c % 2 == 0} | set(range(100, 105))
    check_pages(filled)


def test_the_first_filling_needs_no_second_copy():
    """Beside the store and what is put in there is next to nothing."""
    keep = torch.rand(2, 4, 1000) < 0.9
    rows = torch.randn(2, 4, 1000, 64)
    new = Rows.of(rows, rows, torch.arange(1000).expand(2, 4, -1), None, keep)
    store = pool_like(new, page_size=16, scored=False)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as watched:
        store.fill(new)
    held = sum(tensor.nbytes for tensor in store.tensors())
    requested, most = 0, 0
    for event in watched.profiler.kineto_results.events():
        if event.name() == "[memory]":
            requested += event.nbytes()
            most = max(most, requested)
    assert held <= most < 1.06 * held
