"""Policies that score the prompt: every one against its paper's formula, in loops over whole attention matrices."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import headwise
import tiny
from headwise.hosts.transformers import repetition
from headwise.policies.scored import Scored, across, highest
from oracle import rows_of
from test_rules import facts

TOKENS, PADS, GROUP, DIM, SINKS = 47, 9, 3, 14, 4

# Windows that leave something to choose of prompts this short.
SMALL = [
    headwise.SnapKV(0.3, window=8, kernel=3),
    headwise.SnapKV(19, window=5, kernel=1),
    headwise.SnapKV(19, window=16, kernel=7),
    headwise.PyramidKV(0.4, window=3, kernel=3, steepness=4),
    headwise.TOVA(0.3),
    headwise.KeyNorm(0.21),
    headwise.KeyDiff(11),
    headwise.Scissorhands(0.3, history=10, recent=3),
    headwise.ExpectedAttention(0.3, future=20),
    headwise.ExpectedAttention(13, future=7, sinks=2),
    headwise.ExpectedAttention(0.3, epsilon=0.5),
    headwise.AdaKV(0.3, over=headwise.SnapKV(0.3, window=4, kernel=3)),
    headwise.AdaKV(11, over="keydiff", safeguard=0.5),
    headwise.AdaKV(0.3, over="expected-attention", safeguard=0.0),
    headwise.KVzip(0.3),
    headwise.KVzip(11, sinks=1),
    headwise.PeakAttention(keep=0.4, window=5),
    headwise.PeakAttention(0.7, window=3, sinks=2),
]


@functools.cache
def model():
    return tiny.llama(layers=3)


def words(count, *, seed=0):
    """A prompt in which no token comes twice: in the first layer, rotated keys of equal tokens are equally long."""
    generator = torch.Generator().manual_seed(seed)
    return 3 + torch.randperm(tiny.VOCABULARY - 3, generator=generator)[None, :count]


@pytest.fixture(params=SMALL, ids=str)
def policy(request):
    return request.param


def padded(*prompts):
    """A batch whose pads are words: the model's own pad is all zeros, and nobody would notice it."""
    ids, mask = tiny.left_padded(*prompts)
    return ids.masked_fill(mask == 0, 50), mask


def read(policy, ids, mask=None, *, pieces=None, **options):
    """The cache after the prompt, which comes in pieces of that many columns."""
    cache = headwise.HeadwiseCache(
        model(), policy, tokenizer=tiny.tokenizer(), prompt_tokens=ids.shape[1] if pieces else None, **options
    )
    real = torch.ones_like(ids) if mask is None else mask
    at = (real.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        for start in range(0, ids.shape[1], pieces or ids.shape[1]):
            part = slice(start, start + (pieces or ids.shape[1]))
            shown = None if mask is None else mask[:, : part.stop]
            model()(input_ids=ids[:, part], attention_mask=shown, position_ids=at[:, part], past_key_values=cache)
    return cache


def kept(cache):
    """Of every layer, sequence and head."""
    return [rows_of(layer.core) for layer in cache.headwise_layers]


# The papers' formulas, the long way; nothing of headwise in them. All in double precision, one sequence.


class Whole:
    """What one pass of the model computes: per layer queries before their rotation, keys, values and attention."""

    def __init__(self, ids):
        plain = tiny.llama(layers=3)
        plain.set_attn_implementation("eager")
        queries, handles = [], []
        for layer in plain.model.layers:
            handles.append(layer.self_attn.q_proj.register_forward_hook(lambda *seen: queries.append(seen[-1])))
        cache = DynamicCache()
        with torch.no_grad():
            out = plain(input_ids=ids, past_key_values=cache, use_cache=True, output_attentions=True)
            cos, sin = plain.model.rotary_emb(queries[0], torch.arange(ids.shape[1])[None])
        for handle in handles:
            handle.remove()
        queries = [q.view(ids.shape[1], -1, DIM).transpose(0, 1)[None] for q in queries]
        rotated = [apply_rotary_pos_emb(q, q, cos, sin)[0][0].double() for q in queries]
        self.layers = [
            (q[0].double(), r, layer.keys[0].double(), layer.values[0].double(), a[0].double())
            for q, r, layer, a in zip(queries, rotated, cache.layers, out.attentions, strict=True)
        ]


def group(head):
    return range(head * GROUP, (head + 1) * GROUP)


def snapkv(policy, queries, rotated, keys, values, attention):
    t, scores = keys.shape[1], []
    for head in range(len(keys)):
        votes = [
            sum(attention[g, row, j] for g in group(head) for row in range(t - policy.window, t))
            for j in range(t - policy.window)
        ]
        reach = policy.kernel // 2
        scores.append(
            [
                float(sum(votes[max(0, j - reach) : j + reach + 1])) if j < t - policy.window else 1000.0 + j
                for j in range(t)
            ]
        )
    return scores


def tova(policy, queries, rotated, keys, values, attention):
    t = keys.shape[1]
    return [[math.inf if j == t - 1 else float(attention[:, -1, j].mean()) for j in range(t)]] * len(keys)


def keynorm(policy, queries, rotated, keys, values, attention):
    return [[-math.sqrt(sum(float(x) ** 2 for x in key)) for key in head] for head in keys]


def keydiff(policy, queries, rotated, keys, values, attention):
    scores = []
    for head in keys:
        anchor = sum(key / key.norm() for key in head)
        scores.append([-float(key @ anchor / (key.norm() * anchor.norm())) for key in head])
    return scores


def scissorhands(policy, queries, rotated, keys, values, attention):
    t, scores = keys.shape[1], []
    for head in range(len(keys)):
        rows = [(g, row) for g in group(head) for row in range(t - policy.history, t)]
        counts = [sum(bool(attention[g, row, j] > 1 / (row + 1)) for g, row in rows) for j in range(t)]
        scores.append([1000 + j if j >= t - policy.recent else counts[j] for j in range(t)])
    return scores


def rotation(position):
    """The matrix that turns a column vector to a position."""
    half = DIM // 2
    turn = torch.zeros(DIM, DIM, dtype=torch.float64)
    for i in range(half):
        angle = position * 10_000.0 ** (-2 * i / DIM)
        turn[i, i] = turn[i + half, i + half] = math.cos(angle)
        turn[i, i + half], turn[i + half, i] = -math.sin(angle), math.sin(angle)
    return turn


def expected_attention(policy, queries, rotated, keys, values, attention):
    t, scores = keys.shape[1], []
    turn = sum(rotation(t + step) for step in range(policy.future)) / policy.future
    for head in range(len(keys)):
        shares = torch.zeros(t, dtype=torch.float64)
        for g in group(head):
            counted = queries[g, policy.sinks :]
            mean, spread = turn @ counted.mean(0), turn @ torch.cov(counted.T, correction=0) @ turn.T
            logits = [k @ mean / math.sqrt(DIM) + k @ spread @ k / (2 * DIM) for k in keys[head]]
            shares[policy.sinks :] += torch.stack(logits)[policy.sinks :].softmax(0) / GROUP
        worth = (shares + policy.epsilon) * values[head].norm(dim=-1)
        scores.append([math.inf if j < policy.sinks else float(worth[j]) for j in range(t)])
    return scores


FORMULAS = {
    "snapkv": snapkv,
    "pyramidkv": snapkv,
    "tova": tova,
    "keynorm": keynorm,
    "keydiff": keydiff,
    "scissorhands": scissorhands,
    "expected-attention": expected_attention,
}


def best(scores, count):
    """The places with the highest scores; of equal ones the first."""
    return set(sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:count])


def count_of(keep, tokens=TOKENS):
    return math.ceil(keep * tokens - 1e-9) if isinstance(keep, float) else keep


def pyramid(policy, layer, layers):
    mean = count_of(policy.keep)
    most = TOKENS - policy.window
    first = min(2 * mean - mean / policy.steepness, most)
    last = 2 * mean - first
    assert policy.window <= last <= first
    return round(first + (last - first) * layer / (layers - 1))


def expect_shared(policy, whole):
    scorer = policy.over if isinstance(policy.over, Scored) else headwise.create_policy(policy.over, keep=policy.keep)
    quota, found = count_of(policy.keep), []
    for layer in whole.layers:
        scores = FORMULAS[scorer.name](scorer, *layer)
        own = [best(head, int(quota * policy.safeguard + 1e-9)) for head in scores]
        left = {(h, j): s for h, head in enumerate(scores) for j, s in enumerate(head) if j not in own[h]}
        rest = sorted(left, key=lambda place: (-left[place], place))[: quota * len(scores) - sum(map(len, own))]
        found.append([own[h] | {j for head, j in rest if head == h} for h in range(len(scores))])
    return found


def expect_repeated(policy, ids, chunk):
    """KVzip and PeakAttention: a pass for every chunk, over the prompt, the request and the chunk once more."""
    tokenizer = tiny.tokenizer()
    worth, heads = {}, 2
    for start in range(0, ids.shape[1], chunk):
        part = list(range(start, min(start + chunk, ids.shape[1])))
        text = repetition._NEXT if start else repetition._FIRST
        asked = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
        again = torch.cat([ids, asked, ids[:, max(0, start - 8) : start], ids[:, part]], 1)
        columns = [*range(min(4, start)), *part]
        for index, (_, rotated, keys, _, _) in enumerate(Whole(again).layers):
            for head in range(heads):
                for g in group(head):
                    for row in range(ids.shape[1], again.shape[1]):
                        seen = [*columns, *range(ids.shape[1], row + 1)]
                        weights = (keys[head, seen] @ rotated[g, row] / math.sqrt(DIM)).softmax(0)
                        for j, weight in zip(seen, weights.tolist(), strict=True):
                            if j in part:
                                worth[index, head, j] = max(worth.get((index, head, j), 0.0), weight)
    if policy.name == "peak-attention":
        for index, (*_, attention) in enumerate(Whole(ids).layers):
            for head in range(heads):
                last = attention[head * GROUP : (head + 1) * GROUP, -policy.window :].amax((0, 1)).tolist()
                for j, weight in enumerate(last):
                    newest = j >= ids.shape[1] - policy.window
                    worth[index, head, j] = 1000 + j if newest else max(worth[index, head, j], weight)
    worth = {place: math.inf if place[2] < policy.sinks else weight for place, weight in worth.items()}
    layers = 1 + max(index for index, _, _ in worth)
    if policy.keep is None:
        chosen = [place for place, weight in worth.items() if weight >= 1 - policy.recovery]
    else:
        chosen = sorted(worth, key=lambda p: (-worth[p], p))[: count_of(policy.keep) * heads * layers]
    return [[{j for i, h, j in chosen if (i, h) == (index, head)} for head in range(heads)] for index in range(layers)]


def expect(policy, ids, chunk=2048):
    """Of every layer and head."""
    if policy.name in ("kvzip", "peak-attention"):
        return expect_repeated(policy, ids, chunk)
    whole = Whole(ids)
    if policy.name == "adakv":
        return expect_shared(policy, whole)
    found = []
    for index, layer in enumerate(whole.layers):
        quota = pyramid(policy, index, 3) if policy.name == "pyramidkv" else count_of(policy.keep)
        found.append([best(head, quota) for head in FORMULAS[policy.name](policy, *layer)])
    return found


def test_keeps_what_the_formula_says(policy):
    ids = words(TOKENS, seed=3)
    assert [layer[0] for layer in kept(read(policy, ids))] == expect(policy, ids)


@pytest.mark.parametrize("chunk", [11, 46])
@pytest.mark.parametrize("policy", [headwise.KVzip(0.25), headwise.PeakAttention(keep=0.4, window=5)], ids=str)
def test_repeats_in_several_chunks(policy, chunk, monkeypatch):
    monkeypatch.setattr(repetition, "_CHUNK", chunk)
    ids = words(TOKENS, seed=4)
    assert [layer[0] for layer in kept(read(policy, ids))] == expect(policy, ids, chunk)


# One prompt, given in different ways.


def test_a_sequence_keeps_in_a_batch_what_it_keeps_alone(policy):
    prompts = [words(TOKENS, seed=1)[0], words(TOKENS - PADS, seed=2)[0]]
    together = kept(read(policy, *padded(*prompts)))
    for row, prompt in enumerate(prompts):
        pads = TOKENS - len(prompt)
        for both, alone in zip(together, kept(read(policy, prompt[None])), strict=True):
            assert both[row] == [{column + pads for column in head} for head in alone[0]]


@pytest.mark.parametrize("pieces", [7, 46])
def test_a_prompt_in_pieces_keeps_what_it_keeps_at_once(policy, pieces):
    ids, mask = padded(words(TOKENS, seed=1)[0], words(TOKENS - PADS, seed=2)[0])
    assert kept(read(policy, ids, mask, pieces=pieces)) == kept(read(policy, ids, mask))


def test_working_memory_makes_no_difference(policy, monkeypatch):
    ids = words(TOKENS, seed=6)
    usual = kept(read(policy, ids))
    monkeypatch.setattr("headwise.kernels.attention._BLOCK_LOGITS", 600)
    assert kept(read(policy, ids)) == usual


# Numbers by hand.

SCORES = [0.5, -1.0, 0.5, -0.25, 3.0, -1.0]


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (0, []),
        (1, [4]),
        (2, [0, 4]),  # of two equal ones the earlier
        (3, [0, 2, 4]),
        (5, [0, 1, 2, 3, 4]),
        (9, [0, 1, 2, 3, 4, 5]),
        (0.0, []),
        (0.5, [0, 2, 4]),
        (0.51, [0, 2, 3, 4]),  # 3.06, rounded up
        (1.0, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_the_highest_stay(keep, expected):
    tokens = facts(positions=range(6), prompt=6)
    chosen = highest(torch.tensor([[SCORES]]), tokens, headwise.KeyNorm(keep).quota(tokens))
    assert chosen[0, 0].nonzero().flatten().tolist() == expected


def test_the_highest_of_several_layers_and_heads():
    tokens = [facts(positions=range(3), heads=2), facts(positions=range(3), heads=2)]
    scores = [torch.tensor([[[1.0, 5, 2], [-3, 2, 9]]]), torch.tensor([[[2.0, 0, 2], [8, -1, -2]]])]
    low, high = across(scores, tokens, torch.tensor([[[5]]]))
    # 9, 8, 5, and of the four twos the first two.
    assert low.tolist() == [[[False, True, True], [False, True, True]]]
    assert high.tolist() == [[[False, False, False], [True, False, False]]]


def test_rank_orders_priorities_of_any_sign():
    special = [-math.inf, math.inf, -0.0, 0.0, -1e-45, 1e-45, -3.4e38, 3.4e38, -1.0, 1.0]
    priority = torch.cat([torch.tensor(special), torch.randn(30), -torch.arange(5.0)])[torch.randperm(45)]
    valid = [bool(draw) for draw in torch.rand(45) < 0.8]
    tokens = facts(positions=range(45), valid=valid)
    ranks = tokens.rank(priority.view(1, 1, -1))[0, 0].tolist()
    values = priority.tolist()
    ordered = sorted((j for j in range(45) if valid[j]), key=lambda j: (-values[j], j))
    assert [ranks[j] for j in ordered] == list(range(len(ordered)))
    assert sorted(ranks) == list(range(45))


@pytest.mark.parametrize("policy", [headwise.SnapKV(5), headwise.PyramidKV(5), headwise.Scissorhands(5)], ids=str)
def test_a_prompt_shorter_than_the_window_keeps_its_end(policy):
    assert TOKENS < 64
    found = kept(read(replace(policy, **({"recent": 64} if policy.name == "scissorhands" else {})), words(13)))
    assert found == [[[set(range(8, 13))] * 2]] * 3


def test_expected_attention_of_a_prompt_of_sinks():
    assert kept(read(headwise.ExpectedAttention(2), words(3))) == [[[{0, 1}] * 2]] * 3


def test_a_budget_beyond_the_prompt_keeps_all(policy):
    ids = words(12)
    assert kept(read(policy.with_keep(1000), ids)) == [[[set(range(12))] * 2]] * 3


# Budgets that are shared.


@pytest.mark.parametrize("safeguard", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("keep", [1, 9, 0.3])
@pytest.mark.parametrize("over", ["keydiff", "expected-attention", headwise.SnapKV(1, window=3)], ids=str)
def test_adakv_shares_the_budget_of_a_layer(safeguard, keep, over):
    prompts = [words(TOKENS, seed=1)[0], words(TOKENS - PADS, seed=2)[0]]
    cache = read(headwise.AdaKV(keep, over=over, safeguard=safeguard), *padded(*prompts))
    sizes = [[[len(head) for head in sequence] for sequence in layer] for layer in kept(cache)]
    for layer in sizes:
        for prompt, heads in zip(prompts, layer, strict=True):
            quota = count_of(keep, len(prompt))
            assert sum(heads) == quota * 2
            assert min(heads) >= int(quota * safeguard)
    if safeguard == 1.0:
        assert all(len(set(heads)) == 1 for layer in sizes for heads in layer)
    elif keep != 1 and over != "keydiff":
        assert any(len(set(heads)) > 1 for layer in sizes for heads in layer)


@pytest.mark.parametrize("layers", [1, 2, 7, 30])
@pytest.mark.parametrize("keep", [0, 30, 0.07, 0.3, 0.5, 0.9, 1.0, 5000])
def test_pyramidkv_has_the_mean_it_is_given(layers, keep):
    policy = headwise.PyramidKV(keep, window=16)
    tokens = facts(positions=range(500), prompt=500)
    budgets = [int(policy.quota(replace(tokens, layer=layer, layers=layers))) for layer in range(layers)]
    mean = count_of(keep, 500)
    assert budgets == sorted(budgets, reverse=True)
    # Every layer is rounded for itself.
    assert abs(sum(budgets) - mean * layers) <= layers / 2
    if keep in (0.5, 0.9) and layers > 1:
        assert budgets[0] == 484 and budgets[-1] == 2 * mean - 484
    if keep in (0, 30, 0.07):
        assert set(budgets) == {mean}


@pytest.mark.parametrize("keep", [0, 5, 0.31, 1.0])
def test_kvzip_shares_the_budget_of_the_model(keep):
    prompts = [words(TOKENS, seed=1)[0], words(TOKENS - PADS, seed=2)[0]]
    layers = kept(read(headwise.KVzip(keep, sinks=0), *padded(*prompts)))
    for row, prompt in enumerate(prompts):
        sizes = [len(head) for layer in layers for head in layer[row]]
        assert sum(sizes) == count_of(keep, len(prompt)) * len(sizes)
        assert (len(set(sizes)) > 1) == (keep in (5, 0.31))
