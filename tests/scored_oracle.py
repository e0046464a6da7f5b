"""The papers' formulas, the long way; nothing of headwise in them. All in double precision, one sequence."""

from __future__ import annotations

import math

import torch
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import headwise
import rkv_oracle
import tiny
from headwise.hosts.transformers import repetition
from headwise.policies.scored import Scored
from scored_prompts import TOKENS

GROUP, DIM = 3, 14


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


def rkv(policy, queries, rotated, keys, values, attention):
    t, scores = keys.shape[1], []
    for head in range(len(keys)):
        asked = [
            (row, dict(enumerate(attention[g, row].tolist())))
            for g in group(head)
            for row in range(t - policy.window, t)
        ]
        worth = rkv_oracle.worth(policy, list(range(t)), keys[head], asked)
        scores.append([1000 + j if j >= t - policy.window else worth[j] for j in range(t)])
    return scores


FORMULAS = {
    "rkv": rkv,
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
