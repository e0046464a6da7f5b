"""Rows of a few bits: what is read back, which rows stay exact, and that a row is written down as codes once."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

import headwise
from headwise.errors import ConfigurationError
from headwise.kernels.backends import choose
from headwise.quant.codes import decode, encode, hadamard, rounded
from headwise.quant.formats import Precision, RowFormat
from headwise.store.coded import CodedPages
from headwise.store.narrow import within
from headwise.store.row_parts import row_bytes, row_parts
from headwise.store.rows import Rows
from headwise.store.saved import load_store, save_store
from headwise.store.store import RowStore
from kernel_calls import add_increments, coded_like

KEY_DIM, VALUE_DIM = 12, 8


def bytes_of(format, key_dim, value_dim):
    return row_bytes(row_parts(key_dim, value_dim, torch.float32, format))


REFERENCE = choose("reference", torch.device("cpu"))
FORMATS = (RowFormat(8, 4), RowFormat(4, 4, 4), RowFormat(8, 8))


@pytest.mark.parametrize("dim", [1, 2, 6, 7, 12, 64, 80, 96, 128])
def test_a_rotation_is_orthogonal_and_spreads_one_channel_over_all(dim):
    turn = hadamard(dim, torch.device("cpu"))
    torch.testing.assert_close(turn @ turn.T, torch.eye(dim))
    # Nothing is larger than what a cosine transform of the odd factor has.
    odd = dim // (dim & -dim)
    assert turn.abs().max() <= (2 * odd / dim / odd) ** 0.5 + 1e-6


def test_codes_by_hand():
    rows = torch.tensor([[0.0, 1.0, 2.0, 15.0], [-1.0, -1.0, 0.5, 2.0]])
    codes, steps = encode(rows, 4, 4)
    # Channels 0 and 2 share a byte, and 1 and 3; the second row's step is 0.2.
    assert codes.tolist() == [[0 | 2 << 4, 1 | 15 << 4], [0 | 7 << 4, 0 | 15 << 4]] or codes[1, 0] == 8 << 4
    assert steps.tolist() == [[1.0, 0.0], [pytest.approx(0.2, abs=1e-4), -1.0]]
    assert decode(codes, steps, 4)[0].tolist() == rows[0].tolist()
    codes, steps = encode(rows, 8, 2)
    assert codes[0].tolist() == [0, 255, 0, 255]
    assert steps[0].tolist() == [pytest.approx(1 / 255, rel=1e-3), pytest.approx(13 / 255, rel=1e-3), 0.0, 2.0]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [2, 6, 12])
@pytest.mark.parametrize("size", [1e-3, 1.0, 3e3])
def test_what_is_read_back_is_off_by_half_a_step_at_most(bits, group, size):
    rows = torch.randn(5, 3, 12) * size
    codes, steps = encode(rows, bits, group)
    assert codes.shape == (5, 3, 12 * bits // 8) and steps.shape == (5, 3, 2 * 12 // group)
    step, low = steps.float().repeat_interleave(group, dim=-1).split(12, dim=-1)
    # Beside it, what the step and the least number were rounded by.
    rounding = low.abs() * 2**-11 + step * 2**bits * 2**-11 + 2**-24 * 2**bits
    assert ((decode(codes, steps, bits) - rows).abs() <= step / 2 + rounding).all()


def test_rows_that_do_not_vary_or_are_huge_are_read_back():
    constant = torch.full((1, 12), 0.1)
    torch.testing.assert_close(decode(*encode(constant, 4, 12), 4), constant, atol=1e-4, rtol=0)
    huge = torch.tensor([[-1e30, 1e30] * 6])
    assert decode(*encode(huge, 8, 12), 8).isfinite().all()


@pytest.mark.parametrize(("bits", "group"), [(4, 12), (8, 12), (4, 3), (8, 4)])
def test_rounded_is_what_is_read_back(bits, group):
    rows = torch.randn(2, 3, 7, 12) * torch.rand(12) * 9
    rows[0, 0, 0] = 3.5
    assert torch.equal(rounded(rows, bits, group), decode(*encode(rows, bits, group), bits))


@pytest.mark.parametrize("numbers", [{"key_bits": 3}, {"value_bits": 16}, {"group": 0}, {"key_bits": True}])
def test_a_format_that_cannot_be_is_refused(numbers):
    with pytest.raises(ConfigurationError):
        RowFormat(**{"key_bits": 4, "value_bits": 4} | numbers)


def test_a_format_that_does_not_suit_the_heads_is_refused():
    with pytest.raises(ConfigurationError, match="groups of 5"):
        RowFormat(8, 8, 5).group_of(12)
    with pytest.raises(ConfigurationError, match="pairs"):
        RowFormat(4, 8).group_of(7)
    assert RowFormat(8, 8).group_of(7) == 7


def test_bytes_of_a_row():
    # 12 and 8 codes, a step and a least number of 2 bytes for each group, and the column.
    assert bytes_of(RowFormat(8, 8), 12, 8) == 12 + 4 + 8 + 4 + 4
    assert bytes_of(RowFormat(4, 4, 4), 12, 8) == 6 + 3 * 4 + 4 + 2 * 4 + 4


def content(tokens):
    """Keys and values that say which token they are."""
    generator = torch.Generator().manual_seed(3)
    keys = torch.randn(400, KEY_DIM, generator=generator)
    values = torch.randn(400, VALUE_DIM, generator=generator)
    return keys[tokens], values[tokens]


def rows_of(tokens, keep, scored):
    keys, values = content(tokens)
    return Rows.of(keys, values, tokens.int(), tokens.float() if scored else None, keep)


def check(store, expected):
    """Every head holds those tokens; old ones as they were coded once, the others exactly."""
    rows, precision = store.rows(), store.precision
    assert store.lengths.sum() == rows.keep.sum() == store.occupied().sum()
    exact = store.exact.longest
    for b in range(len(store.lengths)):
        for h in range(store.lengths.shape[1]):
            there = rows.keep[b, h].nonzero().flatten()
            tokens = rows.columns[b, h, there].tolist()
            assert sorted(tokens) == sorted(expected[b][h])
            if not tokens:
                continue
            keys, values = content(torch.tensor(tokens))
            codes = there >= exact
            assert torch.equal(rows.keys[b, h, there][~codes], keys[~codes])
            assert torch.equal(rows.values[b, h, there][~codes], values[~codes])
            if bool(codes.any()):
                coded = store.coded[int(store.formats[b, h])]
                there_all = torch.ones(1, 1, len(tokens), dtype=torch.bool)
                columns = rows.columns[b, h, there].view(1, 1, -1)
                like = Rows.of(keys[None, None], values[None, None], columns, None, there_all)
                once = coded.decode(coded.encode(like))
                torch.testing.assert_close(rows.keys[b, h, there][codes], once.keys[0, 0][codes], atol=1e-4, rtol=0)
                torch.testing.assert_close(rows.values[b, h, there][codes], once.values[0, 0][codes], atol=1e-4, rtol=0)
            assert store.formats[b, h] >= 0 or not bool(codes.any())
            # Never more exact rows than asked for and a page, but for heads that have no format.
            if store.formats[b, h] >= 0:
                assert int((~codes).sum()) < precision.exact + store.page_size + 5
    if store.kept_scores() is not None:
        scores = store.kept_scores()[store.occupied()]
        assert torch.equal(scores, store.kept_columns()[store.occupied()].float())


@pytest.mark.parametrize("scored", [False, True])
@given(data=st.data())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_happens_to_a_store_it_holds_what_it_should(scored, data):
    precision = Precision(FORMATS, recent=data.draw(st.integers(0, 5)), sinks=data.draw(st.integers(0, 3)))
    batch, heads, prompt = 2, 3, data.draw(st.integers(0, 40))
    formats = torch.tensor(data.draw(st.lists(st.integers(-1, 2), min_size=6, max_size=6))).view(batch, heads)
    tokens = torch.arange(prompt).expand(batch, heads, -1)
    rows = rows_of(tokens, torch.rand(batch, heads, prompt) < 0.8, scored)
    store = RowStore(rows, page_size=4, scored=scored, precision=precision, formats=formats)
    store.fill(rows)
    expected = [[tokens[b, h][rows.keep[b, h]].tolist() for h in range(heads)] for b in range(batch)]
    check(store, expected)
    seen = prompt
    for what in data.draw(st.lists(st.sampled_from(["append", "drop", "commit", "select", "save"]), max_size=12)):
        heads_of = range(store.lengths.shape[1])
        if what == "append":
            count = data.draw(st.integers(1, 3))
            new = torch.arange(seen, seen + count)
            fresh = rows_of(
                new.expand(len(store.lengths), heads, -1), torch.ones(*store.lengths.shape, count).bool(), scored
            )
            nothing = torch.zeros(len(store.lengths), heads, store.longest) if scored else None
            store.append(fresh.keys, fresh.values, new.int(), None, fresh.scores, nothing, REFERENCE)
            expected = [[head + new.tolist() for head in sequence] for sequence in expected]
            seen += count
        elif what in ("drop", "commit"):
            keep = torch.rand(store.occupied().shape) < 0.7
            columns, there = store.kept_columns(), store.occupied() & keep
            expected = [[columns[b, h][there[b, h]].tolist() for h in heads_of] for b in range(len(expected))]
            if what == "drop":
                store.drop(keep)
            else:
                new = torch.arange(seen, seen + 5).expand(len(expected), heads, -1)
                fresh = rows_of(new, torch.rand(new.shape) < 0.5, scored)
                store.commit(keep, fresh)
                seen += 5
                for b in range(len(expected)):
                    for h in heads_of:
                        expected[b][h] += new[b, h][fresh.keep[b, h]].tolist()
        elif what == "select":
            chosen = data.draw(st.lists(st.integers(0, len(expected) - 1), min_size=1, max_size=3))
            store.select(torch.tensor(chosen))
            expected = [[list(head) for head in expected[b]] for b in chosen]
        else:
            state = {name: tensor.clone() for name, tensor in save_store(store).items()}
            store = load_store(state, page_size=4, precision=precision)
        check(store, expected)


def test_only_old_rows_become_codes_and_never_the_first():
    """With 2 sinks and 3 recent rows, 12 rows leave 7 as codes."""
    rows = rows_of(torch.arange(12).expand(1, 1, -1), torch.ones(1, 1, 12, dtype=torch.bool), False)
    store = RowStore(rows, page_size=4, scored=False, precision=Precision((RowFormat(8, 8),), recent=3, sinks=2))
    store.fill(rows)
    assert sorted(store.exact.kept("columns")[0, 0].tolist()) == [0, 1, 9, 10, 11]
    assert store.coded[0].pool.kept("columns")[0, 0].tolist() == [2, 3, 4, 5, 6, 7, 8]
    for token in range(12, 16):
        assert store.exact.longest == 5 + token - 12
        new = rows_of(torch.tensor([[[token]]]), torch.ones(1, 1, 1).bool(), False)
        store.append(new.keys, new.values, torch.tensor([token]).int(), None, None, None, REFERENCE)
    # A page's worth has come together.
    assert sorted(store.exact.kept("columns")[0, 0].tolist()) == [0, 1, 13, 14, 15]
    assert store.used_bytes == 5 * ((12 + 8) * 4 + 4) + 11 * bytes_of(RowFormat(8, 8), 12, 8)


def test_rows_after_the_prompt_can_have_a_format_of_their_own():
    formats = torch.tensor([[2, -1]])
    rows = rows_of(torch.arange(12).expand(1, 2, -1), torch.ones(1, 2, 12, dtype=torch.bool), False)
    precision = Precision(FORMATS, recent=3, sinks=2, later=0)
    store = RowStore(rows, page_size=4, scored=False, precision=precision, formats=formats)
    store.fill(rows)
    for token in range(12, 20):
        new = rows_of(torch.full((1, 2, 1), token), torch.ones(1, 2, 1).bool(), False)
        store.append(new.keys, new.values, torch.tensor([token]).int(), None, None, None, REFERENCE)
    held = [sorted(part.pool.kept("columns")[0, 0].tolist()) for part in store.coded]
    # Recent rows of the prompt become old when others have come; from then on they count as later ones.
    assert held == [[9, 10, 11, 12, 13, 14, 15, 16], [], [2, 3, 4, 5, 6, 7, 8]]
    assert store.exact.lengths.tolist() == [[5, 20]]


def test_a_head_that_stays_exact_does_not_make_the_others_pack_row_by_row(monkeypatch):
    """Codes are written once in a page's worth of new rows, however long the exact heads are."""
    formats = torch.tensor([[0, -1]])
    rows = rows_of(torch.arange(60).expand(1, 2, -1), torch.ones(1, 2, 60, dtype=torch.bool), False)
    store = RowStore(rows, page_size=4, scored=False, precision=Precision(FORMATS, recent=3), formats=formats)
    store.fill(rows)
    packed = []
    encode_rows = CodedPages.encode
    monkeypatch.setattr(
        CodedPages, "encode", lambda part, new: packed.append(int(new.keep.sum())) or encode_rows(part, new)
    )
    for token in range(60, 80):
        new = rows_of(torch.full((1, 2, 1), token), torch.ones(1, 2, 1).bool(), False)
        store.append(new.keys, new.values, torch.tensor([token]).int(), None, None, None, REFERENCE)
    assert packed == [4] * 5


def test_nothing_becomes_codes_while_the_store_is_frozen():
    rows = rows_of(torch.arange(12).expand(1, 1, -1), torch.ones(1, 1, 12, dtype=torch.bool), False)
    store = RowStore(rows, page_size=4, scored=False, precision=Precision((RowFormat(8, 8),), recent=3, sinks=2))
    store.fill(rows)
    store.reserve(30)
    store.freeze(True)
    for token in range(12, 36):
        new = rows_of(torch.tensor([[[token]]]), torch.ones(1, 1, 1).bool(), False)
        store.append(new.keys, new.values, torch.tensor([token]).int(), None, None, None, REFERENCE)
        # Whoever replays a captured step counts what it wrote.
        store.count(1)
    assert store.exact.longest == 5 + 24
    store.freeze(False)
    store.encode_old()
    assert store.exact.longest == 5 and store.coded[0].pool.longest == 31


def test_scores_of_codes_are_added_to_where_they_lie():
    keep = torch.ones(1, 2, 20, dtype=torch.bool)
    keep[0, 1, 11:] = False
    rows = rows_of(torch.arange(20).expand(1, 2, -1), keep, True)
    store = RowStore(rows, page_size=4, scored=True, precision=Precision((RowFormat(8, 8),), recent=3, sinks=1))
    store.fill(rows)
    increments = torch.rand(1, 2, store.longest)
    before, there = store.kept_scores(), store.occupied()
    add_increments(REFERENCE, store.view(), increments)
    torch.testing.assert_close((store.kept_scores() - before)[there], increments[there])


def test_encoding_takes_rows_block_by_block_and_gives_the_same():
    many = Rows.of(
        torch.randn(1, 1, 2500, KEY_DIM),
        torch.randn(1, 1, 2500, VALUE_DIM),
        torch.arange(2500)[None, None],
        None,
        torch.ones(1, 1, 2500, dtype=torch.bool),
    )
    packed = coded_like(many, RowFormat(4, 8), page_size=4, scored=False)
    whole = packed.encode(many)
    part = packed.encode(many.cut(slice(1200, 1300)))
    assert torch.equal(whole.keys[:, :, 1200:1300], part.keys)
    assert torch.equal(whole.parts["value_steps"][:, :, 1200:1300], part.parts["value_steps"])


# The cache.


@pytest.mark.parametrize("sign", [1, -1])
def test_numbers_beyond_on_one_side_alone_are_clamped(sign):
    numbers = sign * torch.tensor([1e6, 1.0, 0.5])
    with pytest.warns(headwise.HeadwiseWarning, match="1 numbers of rows"):
        found = within(numbers, torch.float16, "rows", "take others")
    assert found.tolist() == [sign * torch.finfo(torch.float16).max, sign * 1.0, sign * 0.5]
    assert within(found, torch.float16, "rows", "take others") is found
