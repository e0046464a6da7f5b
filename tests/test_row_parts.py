"""A further part of a row: one more line in the list -> every way that rows come, move and go takes it along."""

from __future__ import annotations

import pytest
import torch

from headwise.errors import InputError
from headwise.quant.formats import Precision, RowFormat
from headwise.store import coded, row_parts, saved, store
from headwise.store.row_parts import RowPart
from headwise.store.rows import Rows
from headwise.store.saved import load_store, save_store
from headwise.store.store import RowStore

PROMPT, PAGE, DIM, FRESH = 23, 3, 8, 7.0


@pytest.fixture
def marked(monkeypatch):
    """A list of parts that has one more, which no kernel knows."""
    original = row_parts.row_parts

    def with_mark(*args, **options):
        return (*original(*args, **options), RowPart("mark", (2,), torch.float32, fresh=FRESH))

    for module in (store, coded):
        monkeypatch.setattr(module, "row_parts", with_mark)
    monkeypatch.setattr(saved, "PART_NAMES", (*row_parts.PART_NAMES, "mark"))


def rows_of(columns, keep, mark=True):
    """Rows whose mark is their column, and one less."""
    shape = (*keep.shape[:2], len(columns), DIM)
    rows = Rows.of(torch.randn(shape), torch.randn(shape), columns.expand(keep.shape), None, keep)
    marks = columns.float()[:, None] - torch.arange(2.0)
    return rows.replacing(mark=marks.expand(*keep.shape, 2).clone()) if mark else rows


def new_store(precision, mark=True):
    keep = torch.rand(2, 2, PROMPT) < 0.7
    rows = rows_of(torch.arange(PROMPT), keep, mark)
    made = RowStore(rows, page_size=PAGE, scored=False, precision=precision)
    made.fill(rows)
    return made


def append(made, columns, real, kernels):
    keys, values = torch.randn(2, 2, 2, len(columns), DIM)
    made.append(keys, values, columns, real, None, None, kernels)


def check(made, mark=True):
    """Rows of the prompt have their marks, and those that were appended the fresh one."""
    rows = made.rows()
    columns = rows.columns[rows.keep]
    of_prompt = (columns.float()[:, None] - torch.arange(2.0)) if mark else torch.full((len(columns), 2), FRESH)
    expected = of_prompt.where(columns[:, None] < PROMPT, FRESH)
    torch.testing.assert_close(rows.parts["mark"][rows.keep], expected)
    gathered = made.gather(made.occupied())
    assert torch.equal(gathered.parts["mark"][gathered.keep].sort(0).values, expected.sort(0).values)
    return len(columns)


@pytest.mark.parametrize("precision", [None, Precision((RowFormat(8, 8), RowFormat(8, 4)), recent=3, sinks=1)])
def test_a_further_part_goes_wherever_its_row_goes(marked, precision, kernels):
    made = new_store(precision)
    count = check(made)
    real = torch.tensor([[True] * 5, [False, False, True, True, True]])
    append(made, torch.arange(PROMPT, PROMPT + 5, dtype=torch.int32), real, kernels)
    assert check(made) == count + 2 * 8
    for column in range(PROMPT + 5, PROMPT + 16):
        append(made, torch.tensor([column], dtype=torch.int32), None, kernels)
        check(made)
    made.drop(torch.rand(made.occupied().shape) < 0.6)
    check(made)
    fresh = rows_of(torch.arange(60, 66), torch.ones(2, 2, 6, dtype=torch.bool), mark=False)
    made.commit(torch.rand(made.occupied().shape) < 0.6, fresh)
    check(made)
    made.select(torch.tensor([1, 1, 0]))
    check(made)
    again = load_store(save_store(made), page_size=PAGE, precision=precision)
    assert check(again) == int(made.lengths.sum())


def test_a_captured_step_writes_it_too(marked, kernels):
    made = new_store(None)
    made.reserve(4)
    made.freeze(True)
    append(made, torch.tensor([PROMPT], dtype=torch.int32), None, kernels)
    made.freeze(False)
    made.count(1)
    check(made)


def test_rows_that_come_without_it_get_the_fresh_one(marked):
    check(new_store(None, mark=False), mark=False)


def test_a_saved_cache_without_a_part_is_refused_unless_rows_can_do_without(marked):
    made = new_store(Precision((RowFormat(8, 8),), recent=3, sinks=1))
    state = save_store(made)
    older = {name: tensor for name, tensor in state.items() if "mark" not in name}
    check(load_store(older, page_size=PAGE, precision=made.precision), mark=False)
    broken = {name: tensor for name, tensor in state.items() if "key_steps" not in name}
    with pytest.raises(InputError, match="without key_steps"):
        load_store(broken, page_size=PAGE, precision=made.precision)
