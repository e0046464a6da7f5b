"""Budgets: `with_keep` of every policy, and FastGen's highest recovery within one, against all thresholds there are."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import MISSING, fields

import pytest
import torch

import headwise
import tiny
from headwise.errors import ConfigurationError
from headwise.stages import compact
from headwise.units import parse_bytes

LONG, SHORT = 61, 40

# What each of them keeps is named by something other than a number of tokens.
BOUNDLESS = {"full", "punctuation", "sinks", "special"}


@functools.cache
def model():
    return tiny.llama(layers=3)


def example(name):
    """The policy with 0.5 for every parameter that has no default and for a recovery, and with short windows."""
    names = {field.name: field.default for field in fields(headwise.list_policies()[name])}
    given = {each: 0.5 for each, default in names.items() if default is MISSING or each == "recovery"}
    return headwise.create_policy(name, **given, **({"window": 4} if names.get("window") == 64 else {}))


def read(policy):
    """Tokens kept `[sequences, heads]`, of all layers, by two prompts in a batch; and the cache."""
    ids, mask = tiny.left_padded(tiny.prompt(LONG, seed=1)[0], tiny.prompt(SHORT, seed=2)[0])
    cache = headwise.HeadwiseCache(model(), policy, tokenizer=tiny.tokenizer())
    with torch.no_grad():
        at = (mask.cumsum(1) - 1).clamp(min=0)
        model()(input_ids=ids, attention_mask=mask, position_ids=at, past_key_values=cache)
    return torch.cat(cache.report().kept_tokens, dim=1), cache


def budgets(keep):
    return [math.ceil(keep * n - 1e-9) if isinstance(keep, float) else min(keep, n) for n in (LONG, SHORT)]


@pytest.mark.parametrize("keep", [9, 0.25, 0.6])
# It counts in bytes, and is tested apart.
@pytest.mark.parametrize("name", sorted(set(headwise.list_policies()) - BOUNDLESS - {"auto"}))
def test_a_policy_stays_within_the_budget_it_is_given(name, keep):
    kept, _ = read(example(name).with_keep(keep))
    for sizes, budget in zip(kept, budgets(keep), strict=True):
        mean = float(sizes.double().mean())
        if name == "fastgen":
            # Its cheapest rung is what it is: special tokens.
            assert mean <= budget
            continue
        # A fraction is rounded up for what is ranked, to the nearest for a window; in PyramidKV once for every layer.
        most = budget + (0.5 if name == "pyramidkv" else 1 if name == "h2o" and isinstance(keep, float) else 0)
        assert budget - 1 <= mean <= most


@pytest.mark.parametrize("name", sorted(BOUNDLESS))
def test_a_policy_without_a_budget_says_so(name):
    with pytest.raises(ConfigurationError, match=f"{name} has no budget"):
        example(name).with_keep(5)


@pytest.mark.parametrize("keep", [-1, 1.5, -0.1, True, "many", None])
# It counts in bytes, and is tested apart.
@pytest.mark.parametrize("name", sorted(set(headwise.list_policies()) - BOUNDLESS - {"auto"}))
def test_a_budget_that_is_none_is_refused(name, keep):
    with pytest.raises((ConfigurationError, TypeError)):
        example(name).with_keep(keep)


def test_a_budget_takes_the_place_of_a_recovery():
    policy = headwise.FastGen(0.9, sinks=3).with_keep(0.25)
    assert policy == headwise.FastGen(keep=0.25, sinks=3)
    for given in ({}, {"recovery": 0.9, "keep": 0.5}):
        with pytest.raises(ConfigurationError, match="not both"):
            headwise.FastGen(**given)


@pytest.fixture
def weighed(monkeypatch):
    """What the layers would retain and keep with every rung, as the plan is made from it."""
    seen = []
    make = compact.make_plans
    # A model is tried with a cache of a few tokens when its first one is made, which may be here.
    headwise.HeadwiseCache(model(), headwise.Full())

    def watched(policy, layers):
        seen.extend(layers)
        return make(policy, layers)

    monkeypatch.setattr(compact, "make_plans", watched)
    return seen


def sizes_at(threshold, recovered, kept):
    """Tokens of every head with the cheapest rung that retains as much."""
    return [
        min(size for share, size in zip(shares, sizes, strict=True) if share >= threshold)
        for shares, sizes in zip(recovered, kept, strict=True)
    ]


@pytest.mark.parametrize("options", [{}, {"sinks": 2, "local": 0.1, "frequent": 0.2}, {"fold": "mean"}], ids=str)
@pytest.mark.parametrize("keep", [0.05, 0.35, 0.5, 0.75, 1.0, 12, 5000])
def test_fastgen_has_the_highest_recovery_within_the_budget(keep, options, weighed):
    sizes, cache = read(headwise.FastGen(keep=keep, **options))
    for sequence, n in enumerate((LONG, SHORT)):
        budget = (math.ceil(keep * n - 1e-9) if isinstance(keep, float) else keep) * 6
        recovered = [head for layer in weighed for head in layer.recovered[:, sequence].T.tolist()]
        kept = [head for layer in weighed for head in layer.kept[:, sequence].T.tolist()]
        candidates = sorted({0.0, *(share for shares in recovered for share in shares)})
        totals = [sum(sizes_at(threshold, recovered, kept)) for threshold in candidates]
        assert totals == sorted(totals)
        fitting = [index for index, total in enumerate(totals) if total <= budget]
        # Where not even the cheapest rungs fit, they are taken.
        chosen = max(fitting, default=0)
        assert sizes[sequence].tolist() == sizes_at(candidates[chosen], recovered, kept)
        assert not fitting or int(sizes[sequence].sum()) <= budget
        if chosen + 1 < len(candidates):
            assert totals[chosen + 1] > budget
        for layer in cache.headwise_layers:
            assert layer.core.plan.threshold[sequence] == pytest.approx(candidates[chosen])


def test_fastgen_within_a_budget_treats_sequences_apart():
    together, _ = read(headwise.FastGen(keep=0.4))
    for row, (length, seed) in enumerate(((LONG, 1), (SHORT, 2))):
        cache = headwise.HeadwiseCache(model(), headwise.FastGen(keep=0.4), tokenizer=tiny.tokenizer())
        with torch.no_grad():
            model()(input_ids=tiny.prompt(length, seed=seed), past_key_values=cache)
        assert torch.cat(cache.report().kept_tokens, dim=1)[0].tolist() == together[row].tolist()


@pytest.mark.parametrize(
    ("text", "count"),
    [("64", 64), ("1.5kB", 1500), ("2KiB", 2048), ("3 MiB", 3 * 2**20), ("0.5GiB", 2**29), ("1TB", 10**12)],
)
def test_bytes_are_read_with_their_unit(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "MiB", "64 mib", "-3MB", "1e6", "64MiB each"])
def test_what_is_no_number_of_bytes_is_refused(text):
    with pytest.raises(ConfigurationError, match="64MiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    "policy", [headwise.SnapKV(0.5), headwise.KVzip(0.5), headwise.H2O(4, 4), headwise.FastGen(0.9)]
)
def test_a_budget_in_bytes_is_what_the_rows_take_at_most(policy):
    model = tiny.llama(layers=2)
    full = headwise.HeadwiseCache(model, headwise.Full())
    wanted = 6000
    cache = headwise.HeadwiseCache(model, policy, tokenizer=tiny.tokenizer(), budget=f"{wanted}B")
    with torch.no_grad():
        for each in (full, cache):
            model(input_ids=tiny.prompt(61, seed=3), past_key_values=each)
    assert full.report().used_bytes > 2 * wanted
    used, per_token = cache.report().used_bytes, full.report().used_bytes // LONG
    assert used <= wanted
    # Whole rungs do not come to the last token; everything else does.
    assert used > (0 if isinstance(policy, headwise.FastGen) else wanted - 2 * per_token)


def test_a_budget_smaller_than_a_token_is_refused():
    with pytest.raises(ConfigurationError, match="less than one token"):
        headwise.HeadwiseCache(tiny.llama(), headwise.SnapKV(0.5), budget="3B")


def test_the_recovery_that_was_found_is_reported():
    model = tiny.llama(layers=2)
    caches = [
        headwise.HeadwiseCache(model, policy, tokenizer=tiny.tokenizer(), budget=budget)
        for policy, budget in ((headwise.FastGen(0.9), 0.6), (headwise.FastGen(0.9), None))
    ]
    with torch.no_grad():
        for cache in caches:
            model(input_ids=tiny.prompt(61, seed=3), past_key_values=cache)
    (found,) = caches[0].report().found_recovery
    assert 0 < found <= 1
    assert re.search(rf"recovery found +{found:.3f}\n", str(caches[0].report()))
    assert caches[1].report().found_recovery is None
    # Asked for by itself, that recovery keeps the same.
    again = headwise.HeadwiseCache(model, headwise.FastGen(found), tokenizer=tiny.tokenizer())
    with torch.no_grad():
        model(input_ids=tiny.prompt(61, seed=3), past_key_values=again)
    assert again.report().used_bytes == caches[0].report().used_bytes
