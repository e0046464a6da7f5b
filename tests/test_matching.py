"""Refitted values of one head against the same by brute force; references against what they should be, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from headwise.kernels.interface import AttentionMap
from headwise.matching.fit import fitted
from headwise.matching.references import sampled
from headwise.matching.targets import HeadRows, Targets, squared_error, targets_of
from headwise.types import LogitOptions

PLAIN = LogitOptions(scaling=0.3)
CAPPED = LogitOptions(scaling=0.7, softcap=1.5)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem(tokens, kept, queries, options, *, sinks=None, dim=7, value_dim=5):
    """A head's targets, the rows it keeps, and all rows."""
    everything = HeadRows(drawn(tokens, dim), drawn(tokens, value_dim, seed=1))
    targets = targets_of(drawn(queries, dim, seed=2), sinks, everything, options)
    at = torch.randperm(tokens, generator=torch.Generator().manual_seed(5))[:kept].sort().values
    return targets, HeadRows(everything.keys[at], everything.values[at]), everything


def refitted(targets, rows, ridge):
    """Values alone."""
    mended = fitted(targets, rows, rows.keys, ridge, None)
    assert mended.biases is None and mended.keys is rows.keys
    return mended.values


def logits_of(query, keys, options):
    """In double precision."""
    logits = query.double() @ keys.double().T * options.scaling
    return logits if options.softcap is None else options.softcap * (logits / options.softcap).tanh()


@pytest.mark.parametrize("options", [PLAIN, CAPPED], ids=["plain", "softcap"])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_targets_are_what_the_whole_prompt_gives(options, with_sinks):
    sinks = drawn(13, seed=9) if with_sinks else None
    targets, _, rows = problem(23, 9, 13, options, sinks=sinks)
    logits = logits_of(targets.query, rows.keys, options)
    expected = logits.softmax(dim=-1) @ rows.values.double()
    torch.testing.assert_close(targets.output.double(), expected, atol=1e-5, rtol=1e-4)
    inside = logits.exp().sum(dim=-1)
    torch.testing.assert_close(targets.mass.double(), inside.log(), atol=1e-5, rtol=1e-5)
    share = inside / (inside + sinks.double().exp()) if with_sinks else torch.ones_like(inside)
    torch.testing.assert_close(targets.share.double(), share, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [PLAIN, CAPPED], ids=["plain", "softcap"])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize(("kept", "queries"), [(5, 29), (17, 11), (13, 13), (1, 7), (19, 1), (3, 0)])
@pytest.mark.parametrize("ridge", [0.01, 0.1, 3.0])
def test_values_are_those_of_ridge_regression(options, with_sinks, kept, queries, ridge):
    targets, rows, _ = problem(23, kept, queries, options, sinks=drawn(queries, seed=9) if with_sinks else None)
    share = targets.share[:, None].double()
    weights = logits_of(targets.query, rows.keys, options).softmax(dim=-1) * share
    off = share * targets.output.double() - weights @ rows.values.double()
    least = ridge * weights.square().sum() / kept
    # As one least-squares problem: the errors, and below them the changes.
    stacked = torch.cat([weights, least.sqrt() * torch.eye(kept, dtype=torch.float64)])
    right = torch.cat([off, torch.zeros(kept, off.shape[1], dtype=torch.float64)])
    expected = rows.values.double() + torch.linalg.lstsq(stacked, right).solution
    torch.testing.assert_close(refitted(targets, rows, ridge).double(), expected, atol=2e-4, rtol=2e-3)


def test_the_error_is_the_weighted_one_of_the_outputs():
    targets, rows, _ = problem(23, 7, 13, PLAIN, sinks=drawn(13, seed=9))
    weights = logits_of(targets.query, rows.keys, PLAIN).softmax(dim=-1).float()
    off = targets.share[:, None] * (targets.output - weights @ rows.values)
    torch.testing.assert_close(squared_error(targets, rows), off.square().sum())
    torch.testing.assert_close(targets.size, (targets.share[:, None] * targets.output).square().sum())


@pytest.mark.parametrize("queries", [7, 60])
def test_the_smaller_the_ridge_the_better_the_fit_and_with_a_large_one_values_stay(queries):
    targets, rows, _ = problem(41, 17, queries, PLAIN)
    errors = [squared_error(targets, replace(rows, values=refitted(targets, rows, r))) for r in (1e-4, 0.1, 10.0)]
    assert errors[0] < errors[1] < errors[2] < squared_error(targets, rows)
    torch.testing.assert_close(refitted(targets, rows, 1e9), rows.values)


def test_where_all_rows_are_kept_there_is_nothing_to_change():
    targets, rows, _ = problem(19, 19, 31, PLAIN)
    torch.testing.assert_close(refitted(targets, rows, 0.1), rows.values, atol=1e-5, rtol=1e-5)


def test_of_two_rows_that_no_query_can_tell_apart_the_one_that_stays_gets_the_mean():
    values = torch.tensor([[1.0, -2.0, 4.0], [3.0, 0.0, -8.0]])
    everything = HeadRows(drawn(1, 6).expand(2, -1), values)
    targets = targets_of(drawn(9, 6, seed=1), None, everything, PLAIN)
    fitted = refitted(targets, HeadRows(everything.keys[:1], values[:1]), 1e-6)
    torch.testing.assert_close(fitted, values.mean(dim=0, keepdim=True), atol=1e-4, rtol=1e-4)


def test_what_a_query_gives_to_a_sink_counts_for_nothing():
    """It is as if there were no such query."""
    sinks = torch.where(torch.arange(13) < 6, 1e4, -1e4)
    targets, rows, everything = problem(23, 5, 13, PLAIN, sinks=sinks)
    others = targets_of(targets.query[6:], None, everything, PLAIN)
    torch.testing.assert_close(refitted(targets, rows, 0.1), refitted(others, rows, 0.1))


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_numbers_that_are_none_leave_values_as_they_are(wrong):
    targets, rows, _ = problem(23, 5, 13, PLAIN)
    output, query = targets.output.clone(), targets.query.clone()
    output[3] = query[3] = wrong
    assert torch.equal(refitted(replace(targets, output=output), rows, 0.1), rows.values)
    assert torch.equal(refitted(replace(targets, query=query), rows, 0.1), rows.values)
    both = fitted(replace(targets, query=query), rows, rows.keys, 0.1, 0.1)
    assert torch.equal(both.values, rows.values) and not both.biases.any()


@pytest.mark.parametrize("count", [1, 9, 10, 31])
def test_one_query_in_ten_tests_what_the_others_fit(count):
    targets, _, _ = problem(23, 5, count, PLAIN)
    fitted, tested = targets.split()
    if count < 10:
        assert torch.equal(fitted.query, targets.query) and torch.equal(tested.query, targets.query)
        return
    rest = [i for i in range(count) if i % 10 != 9]
    for those, at in ((tested, list(range(9, count, 10))), (fitted, rest)):
        expected = Targets(
            targets.query[at], targets.output[at], targets.mass[at], targets.share[at], targets.peaks, PLAIN
        )
        names = ("query", "output", "mass", "share")
        assert all(torch.equal(getattr(those, n), getattr(expected, n)) for n in names)


# Biases.


def given_to(targets, keys):
    """In double precision: what queries give rows, of what they give all, times their share."""
    logits = logits_of(targets.query, keys, targets.options)
    return (logits - targets.mass[:, None].double()).exp() * targets.share[:, None].double()


@pytest.mark.parametrize("options", [PLAIN, CAPPED], ids=["plain", "softcap"])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize(("kept", "queries"), [(5, 29), (17, 11), (13, 13), (1, 7), (19, 1), (3, 0)])
@pytest.mark.parametrize("ridge", [0.1, 3.0])
def test_biases_and_values_are_those_of_two_ridge_regressions(options, with_sinks, kept, queries, ridge):
    targets, rows, _ = problem(23, kept, queries, options, sinks=drawn(queries, seed=9) if with_sinks else None)
    # Ridge of the weights so large that none comes near the least.
    found = fitted(targets, rows, rows.keys, ridge, 30 * ridge)
    given, share = given_to(targets, rows.keys), targets.share[:, None].double()

    def least_squares(system, right, ridge):
        least = ridge * system.square().sum() / kept
        stacked = torch.cat([system, least.sqrt() * torch.eye(kept, dtype=torch.float64)])
        return torch.linalg.lstsq(stacked, torch.cat([right, right.new_zeros(kept, right.shape[1])])).solution

    weights = 1 + least_squares(given, share - given.sum(dim=1, keepdim=True), 30 * ridge)[:, 0]
    assert bool((weights > 0.05).all())
    torch.testing.assert_close(found.biases.double(), weights.log(), atol=2e-3, rtol=2e-3)
    scaled = given * found.biases.double().exp()
    off = scaled.sum(dim=1, keepdim=True) * targets.output.double() - scaled @ rows.values.double()
    expected = rows.values.double() + least_squares(scaled, off, ridge)
    torch.testing.assert_close(found.values.double(), expected, atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize("queries", [9, 300])
def test_rows_that_stand_for_others_make_the_denominator_of_all(queries):
    targets, rows, _ = problem(90, 30, queries, PLAIN)
    share = targets.share.double()
    off = []
    for ridge in (1e-3, 0.1, 1e9):
        found = fitted(targets, rows, rows.keys, 0.1, ridge)
        off.append((given_to(targets, rows.keys) @ found.biases.double().exp() - share).square().sum())
    assert off[0] < off[1] < off[2]
    torch.testing.assert_close(found.biases, torch.zeros(30))
    both, alone = fitted(targets, rows, rows.keys, 0.01, 0.1), replace(rows, values=refitted(targets, rows, 0.01))
    assert squared_error(targets, both) < squared_error(targets, alone) < squared_error(targets, rows)


def test_a_row_that_would_count_less_than_nothing_is_held_at_the_least():
    targets, rows, _ = problem(200, 40, 300, LogitOptions(scaling=1.5))
    given, share = given_to(targets, rows.keys), targets.share[:, None].double()
    plain = torch.linalg.lstsq(given, share).solution[:, 0]
    assert bool((plain < 0.05).any())
    weights = fitted(targets, rows, rows.keys, 0.1, 1e-6).biases.double().exp()
    low = weights < 0.051
    assert bool(low.any()) and not bool(low.all()) and bool((weights > 0.0499).all())
    # The others make up for it: clamped alone, the denominators are further off.
    off, clamped = (((given @ w[:, None] - share).square().sum()) for w in (weights, plain.clamp(min=0.05)))
    assert off < clamped


def test_of_two_equal_rows_the_one_that_stays_stands_for_both():
    values = torch.tensor([[1.0, -2.0, 4.0], [3.0, 0.0, -8.0], [0.5, 0.25, 7.0]])
    keys = torch.cat([drawn(1, 6).expand(2, -1), drawn(1, 6, seed=3)])
    targets = targets_of(drawn(31, 6, seed=1), None, HeadRows(keys, values), PLAIN)
    rows = HeadRows(keys[1:], values[1:])
    found = fitted(targets, rows, rows.keys, 1e-7, 1e-7)
    torch.testing.assert_close(found.biases, torch.tensor([2.0, 1.0]).log(), atol=2e-3, rtol=1e-3)
    expected = torch.stack([values[:2].mean(dim=0), values[2]])
    torch.testing.assert_close(found.values, expected, atol=2e-2, rtol=2e-2)


def test_what_a_key_that_is_read_off_takes_from_its_row_its_bias_gives_back():
    """Where all rows are kept; a change of all weights is worth nothing here."""
    targets, _, rows = problem(23, 23, 200, PLAIN)
    read = replace(rows, keys=rows.keys + 0.3 * drawn(23, 7, seed=6))
    expected = given_to(targets, rows.keys).sum(dim=0) / given_to(targets, read.keys).sum(dim=0)
    found = fitted(targets, read, rows.keys, 0.1, 1e9).biases
    torch.testing.assert_close(found.double(), expected.log(), atol=2e-3, rtol=2e-3)
    assert found.abs().max() > 0.1
    far = replace(rows, keys=rows.keys * 40)
    found = fitted(targets, far, rows.keys, 0.1, 1e9).biases
    assert found.isfinite().all() and found.abs().max() <= torch.tensor(5.0).log() + 1e-2


# References.


@pytest.mark.parametrize("padded", [False, True])
def test_targets_and_peaks_are_those_of_every_reference(padded):
    """Of heads that share keys, behind a prompt without positions; padding asks nothing and is not looked at."""
    query, keys, values = drawn(2, 3, 2, 11, 7), drawn(2, 3, 19, 7, seed=1), drawn(2, 3, 19, 5, seed=2)
    mask = torch.ones(2, 11, 19, dtype=torch.bool)
    real = torch.ones(2, 19, dtype=torch.bool)
    options = LogitOptions(0.7, 3.0, drawn(3, 2, seed=4))
    if padded:
        real[1, :11] = mask[1, :, :11] = mask[1, :3] = False
    references = sampled(AttentionMap(query, keys, mask, options), 2)
    found = references.targets(lambda vectors, *_: vectors, keys, values, torch.zeros(2, 19).long(), real)
    assert list(found) == [(b, h) for b in range(2) for h in range(3)]
    for (b, h), targets in found.items():
        best, outputs = torch.zeros(int(real[b].sum()), dtype=torch.float64), []
        for g in range(2):
            for r in range(references.query.shape[3]):
                if references.counted[b, r]:
                    logits = logits_of(references.query[b, h, g, r], keys[b, h][real[b]], options)
                    outputs.append(logits.softmax(dim=-1) @ values[b, h][real[b]].double())
                    logits = torch.cat([logits, options.sinks[h, g].double()[None]])
                    best = best.maximum(logits.softmax(dim=-1)[:-1])
        torch.testing.assert_close(targets.peaks.double(), best, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(targets.output.double(), torch.stack(outputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("count", "most", "expected"),
    [(7, 7, range(7)), (7, 9, range(7)), (7, 3, [1, 3, 5]), (100, 30, [int((i + 0.5) / 0.3) for i in range(30)])],
)
def test_of_many_queries_some_stay_at_equal_distances(count, most, expected):
    targets, _, _ = problem(23, 5, count, PLAIN)
    assert torch.equal(targets.at_most(most).query, targets.query[list(expected)])
    assert torch.equal(targets.at_most(most).peaks, targets.peaks)


@pytest.mark.parametrize("step", [1, 2, 5])
@pytest.mark.parametrize("cuts", [(11, 26), (1, 2), (13,)])
def test_parts_of_a_prompt_give_the_sample_that_the_whole_gives(step, cuts):
    query, keys = drawn(2, 3, 2, 29, 7), drawn(2, 3, 29, 7, seed=1)
    mask = torch.arange(29) <= torch.arange(29)[:, None]
    mask = mask.expand(2, -1, -1) & (torch.arange(29) >= torch.tensor([0, 4])[:, None, None])
    whole = sampled(AttentionMap(query, keys, mask, PLAIN), step)
    assert whole.columns.tolist() == list(range(step // 2, 29, step))
    assert torch.equal(whole.query, query[:, :, :, whole.columns])
    assert whole.counted.tolist() == [[True] * len(whole.columns), [c >= 4 for c in whole.columns.tolist()]]
    assert bool(sampled(AttentionMap(query, keys, None, PLAIN), step).counted.all())
    parts = None
    for start, stop in zip((0, *cuts), (*cuts, 29), strict=True):
        map = AttentionMap(query[:, :, :, start:stop], keys[:, :, :stop], mask[:, start:stop, :stop], PLAIN)
        new = sampled(map, step)
        parts = new if parts is None else parts + new
    for mine, its in zip(parts.tensors(), whole.tensors(), strict=True):
        assert torch.equal(mine, its)


def test_references_are_asked_behind_the_prompt():
    """By a turn in the plane: a query of position p goes to the prompt's length and p more, in circles of 256."""

    def rotation(vectors, positions, back):
        angle = 0.01 * positions[:, None] * (-1 if back else 1)
        cos, sin = angle.cos(), angle.sin()
        x, y = vectors.unbind(dim=-1)
        return torch.stack([x * cos - y * sin, x * sin + y * cos], dim=-1)

    total, padding = 300, 7
    positions = (torch.arange(total) - torch.tensor([[0], [padding]])).clamp(min=0)
    plain = drawn(2, 3, 2, total, 2)
    asked = rotation(plain.flatten(1, 2), positions, False).view(plain.shape)
    references = sampled(AttentionMap(asked, drawn(2, 3, total, 2), None, PLAIN), 3)
    found = references.behind(rotation, positions, torch.tensor([total, total - padding]))
    at = references.columns
    where = torch.tensor([[total], [total - padding]]) + positions[:, at] % 256
    expected = rotation(plain[:, :, :, at].flatten(1, 2), where, False).view(found.shape)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
