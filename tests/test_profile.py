"""Profile and plan against a t x t map by brute force, hand-computed numbers, and sampling."""

from __future__ import annotations

import math

import pytest
import torch

import headwise
from headwise.kernels.attention import dense_attention, query_blocks
from headwise.kernels.backends import choose
from headwise.kernels.interface import AttentionMap
from headwise.policies.frequent import Frequent
from headwise.policies.sinks import Sinks
from headwise.policies.tokens import Tokens
from headwise.policies.window import Window
from headwise.stages.mass_profile import RowWeights, distinct_widths, profile_mass, row_weights
from headwise.stages.plan import make_plans, summarise
from headwise.types import LogitOptions

B, H, G, T, D = 2, 3, 2, 67, 13
KERNELS = choose("reference", torch.device("cpu"))


def plan_of(policy, tokens, found):
    (planned,) = make_plans(policy, [summarise(policy, tokens, found, (None, None))])
    return planned.plan


def profile(query, keys, mask, options, weights, positions, widths, kernels):
    return profile_mass(AttentionMap(query, keys, mask, options), weights, positions, widths, kernels)


def attention_map(query, keys, visible, options):
    """The whole map in fp64: [b, h, g, t, t]."""
    logits = torch.einsum("bhgqd,bhtd->bhgqt", query.double(), keys.double()) * options.scaling
    if options.softcap is not None:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    logits = logits.masked_fill(~visible, -math.inf)
    if options.sinks is not None:
        sink = options.sinks.double()[None, :, :, None, None].expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, sink], -1)
    return logits.softmax(-1)[..., : keys.shape[2]].nan_to_num(0)


def inputs(dtype=torch.float32, sharpness=1.5):
    query = torch.randn(B, H, G, T, D) * sharpness
    return query.to(dtype), torch.randn(B, H, T, D).to(dtype)


def causal_mask(pads):
    """Causal, with that many padding columns on the left of each sequence."""
    real = torch.arange(T)[None] >= torch.tensor(pads)[:, None]
    return torch.ones(T, T, dtype=torch.bool).tril()[None] & real[:, None], real


@pytest.mark.parametrize("pads", [(0, 0), (0, 19)], ids=str)
@pytest.mark.parametrize("options", [LogitOptions(0.3), LogitOptions(0.3, softcap=2.0), "sinks"], ids=str)
@pytest.mark.parametrize("block", [None, 500])
def test_column_sums_equal_the_map(pads, options, block, monkeypatch, kernels):
    if options == "sinks":
        options = LogitOptions(0.3, sinks=torch.randn(H, G))
    if block is not None:
        monkeypatch.setattr("headwise.kernels.attention._BLOCK_LOGITS", block)
    query, keys = inputs()
    mask, real = causal_mask(pads)
    positions = (real.cumsum(1) - 1).clamp(min=0)
    weights = RowWeights(real.float(), real.float())
    widths = [torch.tensor([20, 7]), torch.tensor([1, 60])]
    found = profile(query, keys, None if pads == (0, 0) else mask, options, weights, positions, widths, kernels)

    full = attention_map(query, keys, mask[:, None, None], options) * real[:, None, None, :, None]
    torch.testing.assert_close(found.mass.double(), full.sum(3), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(found.score.double(), full.sum((2, 3)), atol=1e-4, rtol=1e-5)
    for width, band in zip(widths, found.band, strict=True):
        distance = positions[:, :, None] - positions[:, None, :]
        inside = (distance < width[:, None, None])[:, None, None]
        torch.testing.assert_close(band.double(), (full * inside).sum(3), atol=1e-4, rtol=1e-5)
    assert found.rows.tolist() == real.sum(1).tolist()
    if options.sinks is None:
        torch.testing.assert_close(found.mass.sum(-1), real.sum(1)[:, None, None].expand(B, H, G).float())


def test_chunks_add_up_to_the_whole(kernels):
    query, keys = inputs()
    positions = torch.arange(T).expand(B, T)
    ones = torch.ones(B, T)
    options, widths = LogitOptions(0.3), [torch.tensor([20, 9])]
    whole = profile(query, keys, None, options, RowWeights(ones, ones), positions, widths, kernels)
    parts = None
    for start, stop in [(0, 31), (31, 32), (32, T)]:
        rows = RowWeights(ones[:, start:stop], ones[:, start:stop])
        at = positions[:, :stop]
        part = profile(query[:, :, :, start:stop], keys[:, :, :stop], None, options, rows, at, widths, kernels)
        parts = part if parts is None else parts + part
    for mine, its in [(whole.score, parts.score), (whole.mass, parts.mass), (whole.band[0], parts.band[0])]:
        torch.testing.assert_close(mine, its)
    assert torch.equal(whole.rows, parts.rows)


def test_profile_never_holds_the_whole_map(monkeypatch):
    """Peak memory of the logits grows with t, not with t x t."""
    largest = {}
    original = torch.Tensor.softmax

    def watched(self, dim):
        largest[length] = max(largest.get(length, 0), self.numel())
        return original(self, dim)

    monkeypatch.setattr(torch.Tensor, "softmax", watched)
    monkeypatch.setattr("headwise.kernels.attention._BLOCK_LOGITS", 4096)
    for length in (512, 2048):
        query, keys = torch.randn(1, 1, 1, length, 4), torch.randn(1, 1, length, 4)
        ones = torch.ones(1, length)
        profile(query, keys, None, LogitOptions(1.0), RowWeights(ones, ones), torch.arange(length)[None], [], KERNELS)
    assert largest[2048] <= 4096
    assert largest[512] <= 4096


@pytest.mark.parametrize("rows", [1, 7, 0.1, 0.5, 1.0, 200])
def test_sampled_rows_are_even_and_count_for_all(rows):
    policy = headwise.FastGen(0.9, profile_rows=rows)
    prompt = torch.tensor([100, 37])
    positions = torch.arange(100).expand(2, 100)
    real = positions < prompt[:, None]
    weights = row_weights(policy, positions, real, prompt)
    assert weights.score is weights.recovery
    for sequence, n in enumerate(prompt.tolist()):
        chosen = weights.score[sequence].nonzero().flatten()
        expected = min(n, rows if isinstance(rows, int) else math.ceil(rows * n))
        assert len(chosen) == expected
        assert chosen[-1] == n - 1
        assert weights.score[sequence].sum().item() == pytest.approx(n, rel=1e-5)
        gaps = chosen.diff()
        assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


def test_a_sample_of_all_rows_is_exact(kernels):
    query, keys = inputs()
    positions = torch.arange(T).expand(B, T)
    everything = torch.ones(B, T, dtype=torch.bool)
    prompt = torch.tensor([T, T])
    widths = [torch.tensor([20, 20])]

    def run(policy):
        weights = row_weights(policy, positions, everything, prompt)
        return profile(query, keys, None, LogitOptions(0.3), weights, positions, widths, kernels)

    exact, sampled = run(headwise.FastGen(0.9)), run(headwise.FastGen(0.9, profile_rows=T))
    torch.testing.assert_close(exact.mass, sampled.mass)
    part = run(headwise.FastGen(0.9, profile_rows=0.5))
    assert not torch.allclose(exact.mass, part.mass)
    torch.testing.assert_close(exact.mass.sum(-1), part.mass.sum(-1))


def tokens_of(length, scores, kinds=None, batch=1):
    position = torch.arange(length).expand(batch, scores.shape[1], length)
    everything = torch.ones_like(position, dtype=torch.bool)
    n = torch.full((batch, 1, 1), length)
    kind = torch.zeros_like(position, dtype=torch.uint8) if kinds is None else kinds
    return Tokens(position, length - 1 - position, everything, everything, n, n, kind, scores, 0)


@pytest.mark.parametrize(("n", "mean"), [(40, 0.9016), (400, 0.9060), (4000, 0.9064)])
def test_uniform_head_has_the_numbers_of_the_specification(n, mean):
    """A head that attends evenly, w = h = 0.3 n: mean of min(i+1, w + min(h, i+1-w)) / (i+1); last row 0.6."""
    query, keys = torch.zeros(1, 1, 1, n, 2), torch.zeros(1, 1, n, 2)
    positions = torch.arange(n)[None]
    for rows, expected in (("mean", mean), ("last", 0.6)):
        policy = headwise.FastGen(0.95, rows=rows, last_rows=1)
        weights = row_weights(policy, positions, positions >= 0, torch.tensor([n]))
        widths = distinct_widths(policy, torch.tensor([n]))
        found = profile(query, keys, None, LogitOptions(1.0), weights, positions, widths, KERNELS)
        plan = plan_of(policy, tokens_of(n, found.score), found)
        assert plan.recovered[3, 0, 0].item() == pytest.approx(expected, abs=5e-5)
        assert plan.rungs[int(plan.choice)].label == "full"


def random_plan(policy, seed=0, length=T):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(1, H, G, length, D, generator=generator) * 3
    keys = torch.randn(1, H, length, D, generator=generator)
    positions, n = torch.arange(length)[None], torch.tensor([length])
    kinds = torch.randint(0, 3, (1, 1, length), generator=generator).to(torch.uint8).expand(1, H, -1)
    weights = row_weights(policy, positions, positions >= 0, n)
    found = profile(query, keys, None, LogitOptions(0.3), weights, positions, distinct_widths(policy, n), KERNELS)
    return plan_of(policy, tokens_of(length, found.score, kinds), found), found


@pytest.mark.parametrize("length", [1, 2, 5, T])
def test_recovered_mass_never_falls_along_the_ladder(length):
    for seed in range(5):
        plan, _ = random_plan(headwise.FastGen(0.9), seed, length)
        assert (plan.recovered.diff(dim=0) >= -1e-6).all()
        assert torch.equal(plan.recovered[-1], torch.ones(1, H))


@pytest.mark.parametrize("recovery", [0.0, 0.3, 0.5, 0.7, 0.9, 0.98, 1.0])
def test_the_first_rung_that_reaches_the_target_is_taken(recovery):
    plan, _ = random_plan(headwise.FastGen(recovery))
    for head in range(H):
        enough = [r for r in range(4) if plan.recovered[r, 0, head] >= recovery and recovery < 1] or [4]
        assert int(plan.choice[0, head]) == enough[0]


def test_target_one_is_full_and_target_zero_the_first_rung():
    assert {r.label for _, r in random_plan(headwise.FastGen(1.0))[0].chosen} == {"full"}
    assert {r.label for _, r in random_plan(headwise.FastGen(0.0))[0].chosen} == {"special"}
    # Even where a cheaper rung drops nothing: one token, all of it heavy.
    assert {r.label for _, r in random_plan(headwise.FastGen(1.0), length=1)[0].chosen} == {"full"}


def test_a_group_is_folded_by_its_worst_head_or_its_mean():
    low, found = random_plan(headwise.FastGen(0.9, fold="min"))
    mean, _ = random_plan(headwise.FastGen(0.9, fold="mean"))
    heavy = tokens_of(T, found.score)
    static = Frequent(0.3).keep(heavy)[:, :, None]
    per_head = (found.mass * static).sum(-1) / T
    frequent = headwise.FastGen(0.5, ladder=("frequent", "full"))
    assert torch.allclose(random_plan(frequent)[0].recovered[0], per_head.amin(-1))
    assert (low.recovered <= mean.recovered + 1e-6).all()
    assert (low.recovered < mean.recovered - 1e-4).any()


def test_literal_l1_needs_half_of_what_is_missing():
    mass, l1 = headwise.FastGen(0.9).selection, headwise.FastGen(0.9, criterion="l1").selection
    assert (mass.threshold, l1.threshold) == (0.9, 0.95)
    # Why: dropping 1 - S of a row and renormalising moves it by 2 (1 - S) in L1.
    row = torch.rand(50, dtype=torch.float64).softmax(-1)
    keep = torch.rand(50) < 0.5
    retained = row[keep].sum()
    moved = (row - row * keep / retained).abs().sum()
    torch.testing.assert_close(moved, 2 * (1 - retained))


def test_argmin_of_cost_for_a_ladder_that_is_not_nested():
    """A big window listed first does not win over a small set of sinks that is enough as well."""
    n = 20
    query, keys = torch.zeros(1, 1, 1, n, 2), torch.zeros(1, 1, n, 2)
    keys[:, :, 0] = 50.0
    query += 1.0
    policy = headwise.FastGen(0.9, ladder=(Window(19) | Sinks(1), Sinks(1), "full"))
    positions, prompt = torch.arange(n)[None], torch.tensor([n])
    weights = row_weights(policy, positions, positions >= 0, prompt)
    found = profile(query, keys, None, LogitOptions(1.0), weights, positions, distinct_widths(policy, prompt), KERNELS)
    plan = plan_of(policy, tokens_of(n, found.score), found)
    assert plan.choice.tolist() == [[1]]


@pytest.mark.parametrize("target", [0.9, 0.95, 0.98, 0.999])
def test_bf16_models_are_profiled_in_fp32(target):
    query, keys = inputs(torch.bfloat16)
    ones = torch.ones(B, T)
    positions = torch.arange(T).expand(B, T)
    found = profile(query, keys, None, LogitOptions(0.3), RowWeights(ones, ones), positions, [], KERNELS)
    assert found.mass.dtype == torch.float32
    assert headwise.FastGen(target).selection.threshold == target
    mask, _ = causal_mask((0, 0))
    full = attention_map(query, keys, mask[:, None, None], LogitOptions(0.3))
    torch.testing.assert_close(found.mass.double(), full.sum(3), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 4, 5, 22, T])
@pytest.mark.parametrize("options", [LogitOptions(0.3), LogitOptions(0.3, softcap=2.0), "sinks"], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_dense_attention_equals_the_map(rows, options, masked, monkeypatch):
    monkeypatch.setattr("headwise.kernels.attention._BLOCK_LOGITS", 700)
    monkeypatch.setattr("headwise.kernels.attention._MASKED_ROWS", 4)
    if options == "sinks":
        options = LogitOptions(0.3, sinks=torch.randn(H, G))
    query, keys = inputs()
    values = torch.randn(B, H, T, 7)
    mask, real = causal_mask((0, 19) if masked else (0, 0))
    expected = attention_map(query, keys, mask[:, None, None], options)[..., -rows:, :] @ values[:, :, None].double()
    output = dense_attention(
        AttentionMap(query[..., -rows:, :], keys, mask[:, -rows:] if masked else None, options), values
    )
    counted = real[:, -rows:]
    torch.testing.assert_close(
        output.permute(0, 3, 1, 2, 4)[counted].double(),
        expected.permute(0, 3, 1, 2, 4)[counted],
        atol=1e-5,
        rtol=1e-4,
    )


def test_blocks_cover_every_row_once(monkeypatch):
    monkeypatch.setattr("headwise.kernels.attention._BLOCK_LOGITS", 50)
    rows = [r for block in query_blocks(torch.zeros(1, 1, 1, 11, 2), 7) for r in range(block.start, block.stop)]
    assert rows == list(range(11))
