"""The compiled CPU kernels on pages of codes, beside exact ones and fresh rows, against the reference."""

from __future__ import annotations

from dataclasses import replace

import torch

from cases import pairwise
from cpu_inputs import CPU, DTYPES, THREADS, VECTORS, both, check, threads, vectors
from headwise.kernels.backends import choose
from headwise.kernels.cpu import backend as cpu
from headwise.kernels.interface import Coding
from headwise.quant.formats import RowFormat
from headwise.types import LogitOptions
from kernel_calls import add_increments, ragged_decode
from kernel_inputs import packed, packed_codes

__all__ = ["threads", "vectors"]

FORMATS = [RowFormat(keys, values) for keys in (8, 4) for values in (8, 4)]


def coded_view(*arguments, **options):
    return packed_codes(*arguments, **options).view()


@pairwise(format=FORMATS, dtype=DTYPES, biased=[False, True], **THREADS)
def test_every_format(format, dtype, biased, threads):
    """Heads with rows of one kind, of the other, of both and of none; more than fit into one chunk."""
    exact = packed([[0, 5, 33, 0], [70, 0, 1, 0]], dtype=dtype, biased=biased)
    check(*both(exact, [coded_view([[131, 0, 7, 0], [64, 300, 1, 0]], format, dtype=dtype, biased=biased)]), coded=True)


@pairwise(format=FORMATS, group=[1, 2, 3, 4, 7], **VECTORS)
def test_every_group_size(format, group):
    check(*both(packed([[3, 0]]), [coded_view([[20, 77]], format)], group=group), coded=True)


@pairwise(
    bits=[(8, 8), (4, 4), (8, 4)],
    sizes=[
        ((2, 2), None),
        ((6, 10), 2),
        ((16, 32), 1),
        ((24, 24), 8),  # the middle one of three groups lies in both halves of the bytes
        ((36, 60), 12),
        ((64, 64), 16),
        ((64, 64), 32),
        ((96, 48), 16),
        ((80, 80), None),
        ((128, 64), 64),
        ((192, 256), None),
    ],
    **VECTORS,
)
def test_every_head_dimension_and_channel_group(bits, sizes):
    dims, channels = sizes
    exact = packed([[5, 0], [1, 20]], key_dim=dims[0], value_dim=dims[1])
    coded = coded_view([[70, 33], [9, 0]], RowFormat(*bits, channels), key_dim=dims[0], value_dim=dims[1])
    check(*both(exact, [coded], queries=2), coded=True)


@pairwise(dims=[(1, 1), (7, 11), (33, 9)], **VECTORS)
def test_odd_head_dimensions_in_8_bits(dims):
    exact = packed([[5, 0]], key_dim=dims[0], value_dim=dims[1])
    coded = coded_view([[70, 33]], RowFormat(8, 8), key_dim=dims[0], value_dim=dims[1])
    check(*both(exact, [coded]), coded=True)


@pairwise(page_size=[1, 3, 16, 100], rows=[(1, 1), (2, 5), (7, 130)], biased=[False, True], **THREADS)
def test_pages_and_fresh_rows(page_size, rows, biased, threads):
    queries, fresh = rows
    exact = packed([[0, 40], [12, 1]], page_size=page_size, biased=biased)
    coded = coded_view([[63, 0], [129, 2]], RowFormat(8, 4), page_size=page_size, biased=biased)
    check(*both(exact, [coded], queries=queries, fresh=fresh), coded=True)


@pairwise(
    softcap=[None, 2.0],
    sinks=[False, True],
    masked=[False, True],
    dtype=DTYPES,
    biased=[(), (1,), (0, 2), (0, 1, 2)],  # the views that are
    **THREADS,
)
def test_masks_caps_and_sinks(softcap, sinks, masked, dtype, biased, threads):
    exact, queries, fresh = packed([[0, 50, 7], [90, 33, 1]], dtype=dtype, biased=0 in biased), 3, 4
    coded = [
        coded_view([[80, 0, 0], [0, 90, 0]], RowFormat(4, 8), dtype=dtype, biased=1 in biased),
        coded_view([[0, 0, 65], [0, 0, 3]], RowFormat(8, 4, 32), dtype=dtype, biased=2 in biased),
    ]
    mask = None
    if masked:
        # One query sees nothing at all.
        mask = torch.rand(2, queries, 2 * 90 + fresh) < 0.6
        mask[1, 2] = False
    expected, found = both(exact, coded, queries=queries, fresh=fresh, mask=mask, softcap=softcap, sinks=sinks)
    check(expected, found, coded=True)
    assert found.on_kept.shape[-1] == 90 + 90 + 65
    if masked and not sinks:
        assert (found.lse[1, :, :, 2] == -torch.inf).all()
        assert (found.output[1, :, :, 2] == 0).all()


@pairwise(shares=[1, 2, 3, 5, 16, 61], **VECTORS)
def test_every_cut_between_threads(shares, monkeypatch):
    """Cuts go through rows of every kind and between them."""
    monkeypatch.setattr("headwise.kernels.cpu.calls._BYTES_PER_SHARE", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: shares)
    for exact, *coded in (
        ([[0]], [[300]]),
        ([[40]], [[0]], [[90]]),
        ([[1, 0], [0, 2]], [[0, 1], [0, 3]], [[2, 0], [0, 1]]),
        ([[37, 0, 1], [40, 3, 5]], [[400, 0, 0], [0, 9, 1]], [[0, 200, 0], [70, 0, 0]]),
    ):
        views = [coded_view(own, format) for own, format in zip(coded, FORMATS[1:], strict=False)]
        check(*both(packed(exact), views), coded=True)
        check(*both(packed(exact), views, fresh=0, queries=2), coded=True)


@pairwise(with_mass=[False, True], longest=[0, 45], **VECTORS)
def test_views_may_be_empty(longest, with_mass):
    exact = packed([[0, 0]])
    none, some = coded_view([[0, 0]], RowFormat(8, 8)), coded_view([[longest, longest // 2]], RowFormat(4, 4))
    none = replace(none, table=none.table[:, :, :0])
    expected, found = both(exact, [none, some], with_mass=with_mass)
    check(expected, found, coded=True)
    # With nothing to attend to, fresh rows included.
    expected, found = both(exact, [none, coded_view([[0, 9]], RowFormat(8, 4))], fresh=0, with_mass=with_mass)
    check(expected, found, coded=True)
    assert (found.output[0, 0] == 0).all()


@pairwise(**VECTORS)
def test_a_view_may_be_as_long_as_its_pages_have_room_for():
    view = coded_view([[33, 0]], RowFormat(8, 4), page_size=3)
    expected, found = both(packed([[5, 20]]), [replace(view, longest=view.capacity)])
    check(expected, found, coded=True)
    assert view.capacity > 33
    assert (found.on_kept[0, 0, 0, 20 + 33 :] == 0).all()


@pairwise(**VECTORS)
def test_codes_by_hand():
    """Two rows whose matrix swaps channels; groups of one channel; 4-bit keys, 8-bit values."""
    view = coded_view([[2]], RowFormat(4, 8, 1), key_dim=2, value_dim=2, page_size=2)
    steps = torch.tensor([[0.5, 1.0, -1.0, 0.0], [2.0, 1.0, 0.0, 3.0]], dtype=torch.float16)[None]
    swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    view.keys[0] = torch.tensor([[4 | (3 << 4)], [1 | (15 << 4)]], dtype=torch.uint8)
    view.values[0] = torch.tensor([[200, 7], [0, 255]], dtype=torch.uint8)
    steps = steps.expand(len(view.keys), -1, -1).contiguous()
    view = replace(view, table=torch.zeros(1, 1, 1, dtype=torch.int32), coding=Coding(4, 8, steps, steps, swap, swap))
    # Keys are 0.5 * 4 - 1 = 1 and 3, then 2 * 1 + 0 = 2 and 15 + 3 = 18, and swapped: (3, 1) and (18, 2).
    # Values are 200 / 2 - 1 = 99 and 7, then 0 and 255 + 3 = 258: (7, 99) and (258, 0).
    weights = torch.tensor([3.0, 2.0]).log()
    query = torch.linalg.solve(torch.tensor([[3.0, 1.0], [18.0, 2.0]]), weights)[None, None, None, None]
    none = torch.zeros(1, 1, 0, 2)
    exact = packed([[0]], key_dim=2, value_dim=2).view()
    found = ragged_decode(cpu, query, [exact, view], none, none, None, LogitOptions(1.0), with_mass=True)
    torch.testing.assert_close(found.on_kept, torch.tensor([[[[0.6, 0.4]]]]))
    expected = torch.tensor([0.6 * 7 + 0.4 * 258, 0.6 * 99])
    torch.testing.assert_close(found.output[0, 0, 0, 0], expected)
    torch.testing.assert_close(found.lse.exp(), torch.full((1, 1, 1, 1), 5.0))


@pairwise(sharpness=[1e-3, 30.0, 1e3], **VECTORS)
def test_flat_and_sharp_attention(sharpness):
    """Exact and coded rows have largest logits far apart, and either may vanish beside the other."""
    for exact, lengths in (([[300, 2]], [[5, 260]]), ([[0, 1]], [[130, 1]])):
        store = packed(exact)
        store.pools["keys"] *= sharpness
        expected, found = both(store, [coded_view(lengths, RowFormat(8, 8))])
        assert found.output.isfinite().all()
        torch.testing.assert_close(found.output, expected.output, atol=2e-4, rtol=2e-4)
        torch.testing.assert_close(found.lse, expected.lse, atol=1e-3, rtol=1e-5)


def test_increments_reach_the_scores_of_rows_that_are_codes():
    lengths, width = [[130, 5], [0, 47]], 9
    increments = torch.rand(2, 2, width + 130 + 20)
    found = []
    for name in ("reference", "cpu"):
        torch.manual_seed(3)
        exact = packed([[width, 1], [0, 2]], scored=True)
        views = [coded_view(lengths, RowFormat(8, 4), scored=True)]
        views += [coded_view([[0, 20], [3, 1]], RowFormat(4, 4), scored=True)]
        before = [view.lengths.clone() for view in views]
        scores = exact.view().scores.clone()
        add_increments(choose(name, CPU), [exact.view(), *views], increments)
        held = exact.occupied()
        mine = exact.kept("scores")[held] - exact.pages.spread(scores)[held]
        torch.testing.assert_close(mine, increments[:, :, :width][held])
        assert all(torch.equal(view.lengths, then) for view, then in zip(views, before, strict=True))
        found.append([view.scores for view in views])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)
