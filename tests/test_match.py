"""Match around policies: what it leaves alone, what it wins, and that it goes with whatever a cache goes with."""

from __future__ import annotations

import copy
import json

import pytest
import torch

import headwise
import models
import tiny
from headwise import H2O, AdaKV, Auto, FastGen, Full, KeepMedia, KVzip, Less, Match, Quantized, SnapKV, StreamingLLM
from headwise.errors import ConfigurationError, UnsupportedModelError
from headwise.policies.words import describe_policy, parse_policy
from matched import IDS, PROMPT, SNAP, answers, cache_of, llama, read, stores

# What it changes.


@pytest.mark.parametrize(
    "inner", [SNAP, AdaKV(keep=20), Quantized(SNAP, recent=4), Quantized(SNAP, 8, recent=4)], ids=str
)
def test_rows_stay_the_same_but_for_their_values(inner):
    plain, matched = stores(read(inner)), stores(read(Match(inner)))
    for before, after in zip(plain, matched, strict=True):
        assert torch.equal(before.keep, after.keep)
        for name in ("keys", "columns"):
            assert torch.equal(before.parts[name][before.keep], after.parts[name][after.keep])
        assert not torch.equal(before.values[before.keep], after.values[after.keep])


@pytest.mark.parametrize("policy", [Full(), SnapKV(keep=200), Quantized(Full(), recent=200)], ids=str)
def test_where_all_is_kept_as_it_was_nothing_changes(policy):
    cache = read(Match(policy))
    for before, after in zip(stores(read(policy)), stores(cache), strict=True):
        assert torch.equal(before.values, after.values)
    if policy.precision is None:
        assert all(not errors.any() for errors in cache.report().matched)


@pytest.mark.parametrize(
    "inner", [SNAP, AdaKV(keep=20), Quantized(SNAP, recent=4), Quantized(Full(), recent=4)], ids=str
)
def test_no_head_is_worse_for_it_and_most_are_better(inner):
    # Rounding alone leaves little to mend in a model as small as this, and there are few queries to tell it by.
    rounded = isinstance(inner, Quantized) and inner.policy == Full()
    cache = read(Match(inner, ridge=0.3, bias=False) if rounded else Match(inner))
    before, after = torch.cat([errors.flatten(1) for errors in cache.report().matched], dim=1)
    assert bool((after <= before).all())
    assert after.mean() < before.mean()
    assert (after < before).float().mean() > 0.5 or rounded
    assert bool((before > 0).all())


def test_a_large_ridge_leaves_values_as_they_are():
    for before, after in zip(stores(read(SNAP)), stores(read(Match(SNAP, ridge=1e12, bias=False))), strict=True):
        torch.testing.assert_close(before.values, after.values)


def test_more_reference_queries_than_there_are_do_no_harm():
    few, all, more = (stores(read(Match(SNAP, queries=count))) for count in (9, 240, 10**9))
    assert all[0].values.equal(more[0].values)
    assert not all[0].values.equal(few[0].values)


# What it goes with.


def test_a_padded_batch_is_fitted_as_each_sequence_alone():
    """All queries are taken: a sample would be another one behind padding."""
    policy = Match(SNAP, queries=10**6)
    short, long = IDS[0, :61], IDS[0, :PROMPT]
    ids, mask = tiny.left_padded(short, long)
    together = stores(read(policy, ids, mask))
    for row, alone in enumerate((short, long)):
        for batched, single in zip(together, stores(read(policy, alone[None])), strict=True):
            mine = batched.values[row][batched.keep[row]]
            torch.testing.assert_close(mine, single.values[0][single.keep[0]], atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize("chunk", [1, 7, 33])
def test_a_prompt_in_parts_is_fitted_as_in_one(chunk):
    whole = stores(read(Match(SNAP, queries=100)))
    cache = cache_of(Match(SNAP, queries=100), prompt_tokens=PROMPT)
    with torch.no_grad():
        for part in IDS[:, :PROMPT].split(chunk, dim=1):
            llama()(part, past_key_values=cache)
    for mine, its in zip(stores(cache), whole, strict=True):
        assert torch.equal(mine.columns[mine.keep], its.columns[its.keep])
        torch.testing.assert_close(mine.values[mine.keep], its.values[its.keep], atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize("way", ["file", "copy", "selected"])
@pytest.mark.parametrize("inner", [SNAP, Quantized(SNAP, recent=4)], ids=str)
def test_a_cache_that_is_saved_copied_or_selected_goes_on_as_it_was(way, inner, tmp_path):
    policy = Match(inner)
    cache = read(policy, torch.cat([IDS, tiny.prompt(97, seed=8)])[:, :PROMPT])
    if way == "file":
        cache.save(tmp_path / "cache.safetensors")
        other = headwise.HeadwiseCache.load(tmp_path / "cache.safetensors", llama(), policy)
    else:
        other = copy.deepcopy(cache)
    for mine, its in zip(cache.report().matched, other.report().matched, strict=True):
        assert torch.equal(mine, its)
    if way == "selected":
        for each in (cache, other):
            each.batch_select_indices(torch.tensor([1, 0, 1]))
        assert all(errors.shape == (2, 3, 2) for errors in other.report().matched)
        assert all(torch.equal(errors[:, 0], errors[:, 2]) for errors in other.report().matched)
    further = IDS[:, PROMPT:].expand(3 if way == "selected" else 2, -1)
    assert torch.equal(answers(cache, further), answers(other, further))


@pytest.mark.parametrize("family", models.COMPRESSIBLE)
def test_every_family_is_matched_and_generates(family):
    """Soft caps, sinks as logits, layers that slide, queries that share keys."""
    model, ids = models.shared(family), models.prompt()
    if family == "gpt2":
        # Where its queries stand is in their content.
        with pytest.raises(
            UnsupportedModelError,
            match=r"layer 0 of GPT2LMHeadModel makes positions is not known; take SnapKV.* without it",
        ):
            headwise.HeadwiseCache(model, Match(SNAP))
        return
    cache = headwise.HeadwiseCache(model, Match(SnapKV(keep=12, window=4)))
    output = model.generate(ids, past_key_values=cache, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert output.shape[1] == ids.shape[1] + 5
    errors = torch.cat([found.flatten(1) for found in cache.report().matched if found is not None], dim=1)
    assert errors.shape[1] > 0 and bool((errors[1] <= errors[0]).all()) and errors[1].mean() < errors[0].mean()


def test_a_head_that_gives_all_to_its_sinks_keeps_its_own_values():
    model, ids = models.build("gpt-oss"), models.prompt()
    group = 2
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks[:group], layer.self_attn.sinks[group:] = 1e4, -1e4
    policy = SnapKV(keep=12, window=4)
    rows = []
    for each in (policy, Match(policy)):
        cache = headwise.HeadwiseCache(model, each)
        with torch.no_grad():
            model(ids, past_key_values=cache)
        rows.append(cache.headwise_layers[0].core.store.rows())
    plain, matched = (each.values[0] for each in rows)
    assert torch.equal(plain[0], matched[0]) and not torch.equal(plain[1], matched[1])
    assert not rows[1].biases[0, 0].any() and rows[1].biases[0, 1].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_is_fitted_in_single(dtype):
    model = tiny.llama(dtype=dtype)
    cache = headwise.HeadwiseCache(model, Match(SNAP))
    with torch.no_grad():
        model(IDS[:, :PROMPT], past_key_values=cache)
    rows = cache.headwise_layers[0].core.store.rows()
    assert rows.values.dtype is dtype
    before, after = torch.cat([errors.flatten(1) for errors in cache.report().matched], dim=1)
    assert bool((after <= before).all()) and after.mean() < before.mean()


def test_a_prompt_of_few_tokens_or_none_that_are_dropped_is_read():
    for length in (1, 2, 5, 21):
        cache = read(Match(SNAP), IDS[:, :length])
        assert answers(cache).isfinite().all()


def test_numbers_that_are_none_are_no_gain():
    model = tiny.llama()
    cache = headwise.HeadwiseCache(model, Match(SNAP))
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = torch.nan
        output = model(IDS[:, :PROMPT], past_key_values=cache)
    assert output.logits.isnan().any()
    assert not cache.report().matched[0].isnan().any()


# What it is, and what it is refused for.


@pytest.mark.parametrize(
    "policy", [H2O(heavy=9, recent=9), FastGen(0.9), StreamingLLM(window=9), Quantized(H2O(heavy=9, recent=9))], ids=str
)
def test_policies_that_go_on_evicting_are_refused(policy):
    with pytest.raises(ConfigurationError, match=r"goes on evicting.*Match wraps policies that choose by scores"):
        Match(policy)


def test_it_and_less_exclude_each_other():
    model, _ = headwise.load_default_model()
    for policy in (Match(Less(SNAP)), Less(Match(SNAP))):
        with pytest.raises(ConfigurationError, match="take one of them"):
            headwise.HeadwiseCache(model, policy)


@pytest.mark.parametrize(
    "wrong",
    [
        {"ridge": 0},
        {"ridge": -1.0},
        {"ridge": torch.nan},
        {"ridge": True},
        {"queries": 0},
        {"bias": 1},
        {"ahead": -1},
        {"ahead": True},
    ],
)
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        Match(SNAP, **wrong)
    with pytest.raises(ConfigurationError, match="Match wraps a policy"):
        Match(Match(SNAP))


def test_it_is_written_as_python_would_build_it():
    assert str(Match(SNAP)) == f"Match({SNAP})" == "Match(SnapKV(keep=20, window=4))"
    assert str(Match(SNAP, ridge=0.3, bias=False)) == f"Match({SNAP}, ridge=0.3, bias=False)"
    assert Match(SNAP).title == "snapkv, matched"
    assert json.loads(json.dumps(describe_policy(Match(SNAP))))["parameters"]["ridge"] == 0.01
    assert parse_policy("snapkv:keep=20,window=4+match") == Match(SNAP)
    assert parse_policy("kvzip:keep=0.5+int4+match") == Match(Quantized(KVzip(keep=0.5)))
    assert parse_policy("auto:ratio=0.125+match") == Match(Auto(ratio=0.125))
    assert parse_policy("auto:ratio=0.125+match:ahead=0,ridge=0.1") == Match(Auto(ratio=0.125), ridge=0.1, ahead=0)
    assert parse_policy("snapkv:keep=20,window=4+match:bias=false") == Match(SNAP, bias=False)
    with pytest.raises(
        ConfigurationError, match="match has no parameter 'policy'; it has: ridge, queries, bias, ahead"
    ):
        parse_policy("snapkv:keep=20+match:policy=3")
    with pytest.raises(ConfigurationError, match=r"\+match: takes NAME=VALUE"):
        parse_policy("snapkv:keep=20+match:")
    with pytest.raises(ConfigurationError, match="parameter 'ahead' is given twice"):
        parse_policy("snapkv:keep=20+match:ahead=1,ahead=2")
    with pytest.raises(ConfigurationError, match=r"\+match:PARAMETER=VALUE or \+BITS, got '\+match=3'"):
        parse_policy("snapkv:keep=20+match=3")


def test_what_it_wraps_keeps_its_budget():
    assert Match(SNAP).with_keep(5) == Match(SnapKV(keep=5, window=4))
    assert Match(Auto(ratio=0.5)).with_bytes(1000) == Match(Auto(bytes=1000))
    assert Match(KeepMedia(SNAP)).chooser == KeepMedia(SNAP)
    assert Match(Quantized(SNAP)).policy == Quantized(SNAP) and Match(SNAP).chooser.again == SNAP.again


def test_the_report_says_what_it_won():
    report = read(Match(SNAP)).report()
    assert "before rows were refitted" in str(report) and "outputs off by" in str(report)
    given = report.to_dict()["matched"]
    assert torch.tensor(given).shape == (3, 2, 1, 2)
    assert "matched" not in read(SNAP).report().to_dict()
