"""Caches that remember what they evict, pass by pass against the definition of LESS, and the contract of a cache."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import headwise
import models
import tiny
from cases import EVERYTHING, pairwise, singly
from headwise.errors import CacheStateError
from headwise.hosts.transformers.graph import DecodeGraph
from headwise.kernels.attention import dense_attention
from headwise.kernels.backends import choose
from headwise.kernels.interface import AttentionMap
from headwise.less.features import LayerFeatures
from headwise.stages.config import CacheConfig, LayerConfig
from headwise.stages.layer import LayerCache
from headwise.stages.token_log import TokenLog
from headwise.types import LogitOptions
from less_oracle import StateChecker, close, draw, kernels_of, networks_of, use_less_oracle, watch
from models import MIXED, MODES
from oracle import rows_of
from test_every_policy import EVERY
from test_graph import NeverWaits, traced
from test_oracle import play

TOKENIZER = tiny.tokenizer()
REFERENCE = choose("reference", torch.device("cpu"))
SMALL, SCORED = headwise.StreamingLLM(window=5, sinks=4), headwise.H2O(heavy=4, recent=5)


def remembering(model, policy, networks=None, **options):
    """A cache with LESS, and its networks."""
    networks = networks_of(model) if networks is None else networks
    policy = headwise.Less(policy, kernels_of(model, networks))
    return headwise.HeadwiseCache(model, policy, **{"tokenizer": TOKENIZER, "evict_every": 1, **options})


def batch():
    ids, mask = tiny.left_padded(tiny.prompt(23, seed=1)[0], tiny.prompt(37, seed=2)[0], tiny.prompt(5, seed=3)[0])
    # The embedding of the padding token is 0, and so would be what is folded in for it.
    return ids.masked_fill(mask == 0, 50), mask


@torch.no_grad()
def logits(model, ids, cache, **options):
    return model(ids, past_key_values=cache, **options).logits


def states(cache):
    return [layer.core.evicted.state() for layer in cache.headwise_layers]


def same_states(mine, its, tolerance=0.0):
    for one, other in zip(states(mine), states(its), strict=True):
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(one[name], other[name], atol=tolerance, rtol=tolerance)


# Against the oracle, which decides for itself what to keep.


@singly(
    policy=[
        headwise.Full(),
        SMALL,
        SCORED,
        headwise.Window(7),
        headwise.Window(0.4),
        headwise.H2O(heavy=0.2, recent=0.1),
        headwise.Random(keep=8),
        headwise.FastGen(0.4),
        headwise.FastGen(0.75),
    ],
    way=[("cpu", 1), ("cpu", 3), ("reference", 1), ("reference", 16)],
)
def test_left_padded_batch_agrees_with_the_oracle(policy, way):
    kernel, evict_every = way
    model, steps = tiny.llama(layers=2), (1, 1, 1, 1, 5, 1, 2, 1, 1, 1, 1)
    networks, (ids, mask) = networks_of(model), batch()
    options = {"evict_every": evict_every, "kernel": kernel, "page_size": 4}
    ours = remembering(model, policy, networks, **options)
    oracle = headwise.HeadwiseCache(model, policy, tokenizer=TOKENIZER, **options)
    use_less_oracle(oracle, networks)
    continuation = tiny.prompt(sum(steps), seed=9, batch=len(ids))
    got = play(model, ours, ids, mask, continuation, steps)
    expected = play(model, oracle, ids, mask, continuation, steps)
    for mine, its in zip(ours.headwise_layers, oracle.headwise_layers, strict=True):
        assert rows_of(mine.core) == rows_of(its.core)
        if mine.core.evicted.sums is None:
            assert not its.core.gone.any()
            continue
        sums, mass = its.core.state
        close(mine.core.evicted.sums, sums, 2e-5)
        close(mine.core.evicted.mass, mass, 1e-5)
    torch.testing.assert_close(got[0][mask.bool()], expected[0][mask.bool()], atol=2e-4, rtol=1e-4)
    for mine, its in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(mine, its, atol=2e-4, rtol=1e-4)


# One layer alone, of any shape.


def layer(policy, networks, *, kernels=REFERENCE, evict_every=1, page_size=4, prompt_columns=None):
    config = CacheConfig(kernels, page_size, prompt_columns, evict_every)
    return LayerCache(LayerConfig(0, policy, config, features=networks), TokenLog("kind" in policy.facts))


def stream(core, query, keys, values, lengths, options, seen=None):
    """The outputs of every pass, as columns are given in passes of those lengths."""
    outputs, start = [], 0
    for length in lengths:
        rows = slice(start, start + length)
        outputs.append(core.attend(query[:, :, :, rows], keys[:, :, rows], values[:, :, rows], None, options))
        start += length
        if seen is not None:
            seen(core)
    return torch.cat(outputs, dim=3)


def random_rows(b=2, h=2, g=3, t=50, d=16, e=16):
    return torch.randn(b, h, g, t, d), torch.randn(b, h, t, d), torch.randn(b, h, t, e)


@pairwise(
    indirect=["kernels"],
    shape=[(3, 1, 16, "plain"), (2, 3, 16, "sinks"), (1, 6, 16, "softcap"), (2, 2, 7, "plain")],
    policy=[SMALL, SCORED],
    prompt=[1, 6, 9, 20],
    kernels=["reference", "cpu"],
)
def test_every_step_of_a_layer_agrees_with_the_definition(policy, prompt, shape, kernels):
    heads, group, value_dim, kind = shape
    networks = draw(heads, group, 16)
    core = layer(policy, networks.folded(), kernels=kernels)
    checker = StateChecker(core, networks, tolerance=1e-5)
    options = LogitOptions(
        0.25, 3.0 if kind == "softcap" else None, torch.randn(heads, group) if kind == "sinks" else None
    )
    rows = random_rows(h=heads, g=group, t=prompt + 30, e=value_dim)
    stream(core, *rows, [prompt, *[1] * 30], options, lambda _: checker.check_state())
    assert checker.effect > 0.02


@pytest.mark.parametrize("evict_every", [1, 16])
@pytest.mark.parametrize("policy", [SMALL, SCORED], ids=lambda policy: policy.name)
def test_padding_of_a_later_turn_is_not_folded_in(policy, evict_every):
    networks = draw(2, 3, 16)
    core = layer(policy, networks.folded(), evict_every=evict_every)
    checker = StateChecker(core, networks)
    query, keys, values = random_rows(t=45)
    real = torch.ones(2, 45, dtype=torch.bool)
    real[1, 17:24] = False
    mask = torch.ones(45, 45, dtype=torch.bool).tril() & real[:, None]
    for start, end in ((0, 12), (12, 24), (24, 25), (25, 45)):
        rows = slice(start, end)
        given = query[:, :, :, rows], keys[:, :, rows], values[:, :, rows], mask[:, rows, :end]
        core.attend(*given, LogitOptions(0.25))
        checker.check_state()
    assert checker.effect > 0.02


@pytest.mark.parametrize(
    "policy", [headwise.H2O(4, 5), headwise.H2O(0, 5), headwise.H2O(4, 0), headwise.Window(6)], ids=str
)
def test_a_head_holds_its_budget_and_a_state_of_constant_size(policy):
    networks = draw(2, 3, 16)
    core = layer(policy, networks.folded())
    budget = policy.heavy + policy.recent if isinstance(policy, headwise.H2O) else policy.size
    sizes = set()

    def look(core):
        if core.store is not None and core.seen > budget:
            assert core.store.lengths.unique().tolist() == [budget]
            sizes.add(core.evicted_bytes)
            assert core.used_bytes == core.store.used_bytes + core.evicted_bytes

    stream(core, *random_rows(t=40), [6, *[1] * 10, 4, *[1] * 20], LogitOptions(0.25), look)
    # Two sequences, two KV heads, 4 features of 16 numbers and one more, 4 bytes each.
    assert sizes == {2 * 2 * 4 * 17 * 4}


@pytest.mark.parametrize("policy", [SMALL, SCORED, headwise.Random(keep=3)], ids=str)
def test_within_the_budget_attention_is_full_and_nothing_is_remembered(policy):
    query, keys, values = random_rows(t=3)
    core, options = layer(policy, draw(2, 3, 16).folded()), LogitOptions(0.25)
    found = stream(core, query, keys, values, [1, 1, 1], options)
    torch.testing.assert_close(
        found, dense_attention(AttentionMap(query, keys, None, options), values), atol=1e-6, rtol=0
    )
    assert core.evicted.state() == {}
    assert core.evicted_bytes == 0


class Exact(LayerFeatures):
    """Features that make the state exact: one for every column, whose weight is the exponential of its logit."""

    def of_queries(self, query):
        return (query @ self.query_in).exp()

    def of_keys(self, keys):
        nearest = torch.cdist(keys, self.key_in.transpose(-1, -2)).argmin(-1)
        return torch.nn.functional.one_hot(nearest, self.count).float()

    def to(self, device):
        return self


# Twelve meet every policy with every interval.
@pytest.mark.parametrize("seed", range(50 if EVERYTHING else 12))
def test_with_exact_features_the_output_is_full_attention(seed):
    torch.manual_seed(seed)
    query, keys, values = random_rows(b=1, t=40, d=8, e=8)
    options = LogitOptions(0.3)
    columns = keys[0].transpose(-1, -2)
    kernels = Exact(
        (columns * 0.3)[:, None].expand(-1, 3, -1, -1),
        torch.zeros(2, 3, 40, 40),
        columns,
        torch.zeros(2, 40, 40),
        torch.eye(40).expand(2, -1, -1),
    )
    policy = [headwise.Random(keep=5, seed=seed), SMALL, SCORED, headwise.Window(1)][seed % 4]
    core = layer(policy, kernels, evict_every=1 + seed % 3)
    found = stream(core, query, keys, values, [1 + seed % 20, *[1] * (39 - seed % 20)], options)
    torch.testing.assert_close(
        found, dense_attention(AttentionMap(query, keys, None, options), values), atol=1e-5, rtol=0
    )
    assert core.store.lengths.max() < 12


def test_grouped_queries_share_the_state_of_their_kv_head():
    """As without groups, with keys, values and key networks repeated for every query head."""
    networks = draw(2, 3, 16).folded()
    alone = LayerFeatures(
        networks.query_in.flatten(0, 1)[:, None],
        networks.query_out.flatten(0, 1)[:, None],
        *(t.repeat_interleave(3, 0) for t in (networks.key_in, networks.key_out, networks.key_mix)),
    )
    query, keys, values = random_rows()
    lengths, options = [9, *[1] * 41], LogitOptions(0.25)
    grouped, single = layer(SMALL, networks), layer(SMALL, alone)
    found = stream(grouped, query, keys, values, lengths, options)
    repeated = keys.repeat_interleave(3, 1), values.repeat_interleave(3, 1)
    expected = stream(single, query.flatten(1, 2)[:, :, None], *repeated, lengths, options)
    torch.testing.assert_close(found.flatten(1, 2)[:, :, None], expected, atol=1e-5, rtol=0)
    assert grouped.evicted.sums.shape == (2, 2, 4, 16)
    torch.testing.assert_close(grouped.evicted.sums.repeat_interleave(3, 1), single.evicted.sums, atol=1e-5, rtol=1e-5)


# Every policy, mode and family, with a checker behind every layer.


def step_by_step(model, cache, ids, mask, count):
    further = tiny.prompt(count, seed=8, batch=len(ids))
    play(model, cache, ids, mask, further, [1] * count)


@singly(policy=[policy for policy in EVERY if policy.precision is None], way=[(1, 3), (16, 16)])
def test_every_policy_remembers_each_token_it_evicts_once(policy, way):
    evict_every, page_size = way
    model = tiny.llama(layers=2)
    networks, (ids, mask) = networks_of(model), batch()
    cache = remembering(model, policy, networks, evict_every=evict_every, page_size=page_size)
    checkers = watch(cache, networks)
    step_by_step(model, cache, ids, mask, 20)
    for checker in checkers:
        checker.check_state()
        assert checker.effect > 1e-3 or isinstance(policy, headwise.Full) or not checker.core.plan.rungs[0].evicts


# Each with one of the policies, in turn.
CASES = [
    pytest.param(family, [SMALL, SCORED, headwise.SnapKV(keep=0.4)][(turn + number) % 3], mode, id=f"{family}-{mode}")
    for turn, family in enumerate(["llama", "gemma3", "gpt-oss", "gpt2"])
    for number, mode in enumerate(MODES)
    # One family takes all, the others every third.
    if EVERYTHING or turn == 0 or (turn + number) % 3 == 0
]


@pytest.mark.parametrize("outside", ["less", "quantized"])
def test_rows_that_are_codes_are_folded_in_as_the_numbers_they_stand_for(outside):
    """Nearly what exact rows leave behind; the sequence is long enough for codes to be evicted."""
    model, ids = tiny.llama(layers=2), tiny.prompt(90, seed=6)
    window, networks = headwise.StreamingLLM(window=30, sinks=4), networks_of(model)
    exact = remembering(model, window, networks)
    if outside == "less":
        coded = remembering(model, headwise.Quantized(window, 8, recent=3), networks)
    else:
        inner = headwise.Less(window, kernels_of(model, networks))
        coded = headwise.HeadwiseCache(model, headwise.Quantized(inner, 8, recent=3), evict_every=1)
    for cache in (exact, coded):
        logits(model, ids[:, :40], cache)
        for at in range(40, 90):
            logits(model, ids[:, at : at + 1], cache)
    assert max(part.pool.longest for part in coded.headwise_layers[0].core.store.coded) > 10
    for one, other in zip(states(exact), states(coded), strict=True):
        for name in ("less_sums", "less_mass"):
            error = (one[name] - other[name]).norm() / one[name].norm()
            assert 0 < error < 0.05


@pytest.mark.parametrize(("family", "policy", "mode"), CASES)
def test_every_way_to_generate_agrees_with_the_definition(family, policy, mode):
    model = models.shared(family)
    models.lookup_prompt(model)
    networks = networks_of(model, models.full_layers(family))
    prompt_tokens = models.PROMPT if mode == "chunked" else None
    cache = remembering(model, policy, networks, prompt_tokens=prompt_tokens, evict_every=3)
    checkers = watch(cache, networks, tolerance=5e-5)
    MODES[mode](model, cache)
    assert len(checkers) == (models.LAYERS - 1 if family in MIXED else models.LAYERS)
    for checker in checkers:
        checker.check_state()
        assert checker.effect > 1e-3


def test_the_models_own_caches_get_no_state():
    model = models.shared("gemma3")
    cache = remembering(model, SMALL, networks_of(model))
    logits(model, models.prompt(31), cache)
    assert [layer.memory_bytes > 0 for layer in cache.report().layers] == [False, True, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_has_a_state_in_fp32(dtype):
    model = tiny.llama(layers=2, dtype=dtype)
    networks = networks_of(model)
    cache = remembering(model, SCORED, networks)
    checkers = watch(cache, networks, tolerance=5e-3 if dtype == torch.float16 else 2e-2)
    step_by_step(model, cache, *batch(), 9)
    for checker, held in zip(checkers, states(cache), strict=True):
        assert {tensor.dtype for tensor in held.values()} == {torch.float32}
        # The keys are known as they were stored, so that nothing but the order of the sums differs.
        checker.tolerance = 1e-5
        checker.check_state()


# The contract of a cache.


def two_caches(model, policy=SCORED, **options):
    networks = networks_of(model)
    return [remembering(model, policy, networks, **options) for _ in range(2)]


@pytest.mark.parametrize("policy", [SMALL, SCORED, headwise.SnapKV(keep=9)], ids=lambda policy: policy.name)
def test_a_row_of_a_batch_is_as_it_is_alone(policy):
    model, prompts = tiny.llama(layers=2), [tiny.prompt(23, seed=1), tiny.prompt(37, seed=2), tiny.prompt(5, seed=3)]
    ids, mask = batch()
    together = remembering(model, policy)
    further = tiny.prompt(20, seed=8, batch=3)
    outputs = play(model, together, ids, mask, further, [1] * 20)
    for row, prompt in enumerate(prompts):
        alone = remembering(model, policy)
        expected = play(model, alone, prompt, torch.ones_like(prompt), further[row : row + 1], [1] * 20)
        for mine, its in zip(outputs[1:], expected[1:], strict=True):
            torch.testing.assert_close(mine[row : row + 1], its, atol=1e-4, rtol=1e-4)
        for mine, its in zip(states(together), states(alone), strict=True):
            for name, tensor in its.items():
                torch.testing.assert_close(mine[name][row : row + 1], tensor, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("policy", [SMALL, SCORED], ids=lambda policy: policy.name)
def test_a_second_prompt_after_reset_is_as_in_a_fresh_cache(policy):
    model = tiny.llama(layers=2)
    used, fresh = two_caches(model, policy)
    step_by_step(model, used, *batch(), 9)
    used.reset()
    assert used.report().memory_bytes == 0
    ids = tiny.prompt(31, seed=4)
    mine, its = (play(model, cache, ids, torch.ones_like(ids), ids[:, 1:], [1] * 12) for cache in (used, fresh))
    assert all(torch.equal(one, other) for one, other in zip(mine, its, strict=True))
    same_states(used, fresh)


def test_two_prompts_in_two_caches_do_not_mix():
    model = tiny.llama(layers=2)
    one, other = two_caches(model)
    first, second = tiny.prompt(31, seed=4), tiny.prompt(27, seed=5)
    logits(model, first, one)
    before = copy.deepcopy(states(one))
    logits(model, second, other)
    for held, was in zip(states(one), before, strict=True):
        assert all(torch.equal(held[name], was[name]) for name in was)


SELECTIONS = {
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 2, 0])), [1, 2, 0]),
    "reorder-with-repeats": (lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0]),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_a_selection_takes_the_state_along(name):
    change, indices = SELECTIONS[name]
    model, (ids, mask) = tiny.llama(layers=2), batch()
    changed, same = two_caches(model)
    further = tiny.prompt(24, seed=8, batch=3)
    for cache in (changed, same):
        play(model, cache, ids, mask, further, [1] * 6)
    change(changed)
    mask = torch.cat([mask, torch.ones(3, 6, dtype=torch.long)], 1)
    for step in range(6, 24):
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
        new, at = further[:, step : step + 1], mask.sum(1, keepdim=True) - 1
        expected = logits(model, new, same, attention_mask=mask, position_ids=at)
        found = logits(model, new[indices], changed, attention_mask=mask[indices], position_ids=at[indices])
        torch.testing.assert_close(found, expected[indices], atol=1e-4, rtol=1e-4)
    for mine, its in zip(states(changed), states(same), strict=True):
        for field, tensor in its.items():
            torch.testing.assert_close(mine[field], tensor[indices], atol=2e-5, rtol=1e-5)


def test_what_was_generated_can_be_taken_back_while_nothing_of_it_is_folded_in():
    model, ids, more = tiny.llama(layers=2), tiny.prompt(31), tiny.prompt(9, seed=5)
    cropped, plain = two_caches(model, headwise.SnapKV(keep=9), prompt_tokens=31)
    for cache in (cropped, plain):
        logits(model, ids, cache)
    before = copy.deepcopy(states(cropped))
    logits(model, more, cropped)
    assert cropped.is_croppable
    cropped.crop(-7)
    logits(model, more[:, :2], plain)
    for held, was in zip(states(cropped), before, strict=True):
        assert was
        assert all(torch.equal(held[name], was[name]) for name in was)
    torch.testing.assert_close(logits(model, ids[:, :3], cropped), logits(model, ids[:, :3], plain))
    with pytest.raises(CacheStateError, match=r"does not return; reset\(\)"):
        cropped.crop(-6)


def test_what_may_have_been_folded_in_cannot_be_taken_back():
    model = tiny.llama(layers=2)
    cache = remembering(model, SMALL)
    logits(model, tiny.prompt(31), cache)
    before = copy.deepcopy(states(cache))
    with pytest.raises(CacheStateError, match=r"does not return; reset\(\)"):
        cache.crop(-1)
    assert all(
        torch.equal(held["less_sums"], was["less_sums"]) for held, was in zip(states(cache), before, strict=True)
    )


@pytest.mark.parametrize("policy", [SMALL, SCORED], ids=lambda policy: policy.name)
def test_drafts_that_are_refused_are_not_folded_in(policy):
    model, ids, draft = tiny.llama(layers=2), tiny.prompt(31), tiny.prompt(6, seed=6)
    drafting, plain = two_caches(model, policy, prompt_tokens=31)
    logits(model, ids, plain)
    logits(model, draft[:, :2], plain)
    drafting.activate_past_recording()
    logits(model, ids, drafting)
    drafting.crop(0)
    logits(model, draft, drafting)
    drafting.crop(-4)
    same_states(drafting, plain, 1e-5)
    torch.testing.assert_close(logits(model, ids[:, :3], drafting), logits(model, ids[:, :3], plain))


@pytest.mark.parametrize("way", ["file", "copy"])
@pytest.mark.parametrize("policy", [SMALL, SCORED, headwise.Full()], ids=lambda policy: policy.name)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_saved_cache_goes_on_as_it_was(family, policy, way, tmp_path):
    model = models.shared(family)
    networks = networks_of(model, models.full_layers(family))
    cache = remembering(model, policy, networks, page_size=5)
    logits(model, models.prompt(29), cache)
    logits(model, models.prompt(1), cache)
    if way == "file":
        cache.save(tmp_path / "cache")
        loaded = headwise.HeadwiseCache.load(
            tmp_path / "cache", model, cache.policy, tokenizer=TOKENIZER, evict_every=1, page_size=3
        )
    else:
        loaded = copy.deepcopy(cache)
    same_states(loaded, cache)
    assert loaded.report().used_bytes == cache.report().used_bytes
    for token in range(11, 24):
        one, other = (logits(model, torch.tensor([[token]]), each) for each in (cache, loaded))
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    same_states(loaded, cache, 1e-5)


def test_a_cache_saved_with_other_kernels_is_refused(tmp_path):
    model = tiny.llama(layers=2)
    cache = remembering(model, SMALL)
    logits(model, tiny.prompt(29), cache)
    cache.save(tmp_path / "cache")
    other = headwise.Less(SMALL, kernels_of(model, {i: draw(2, 3, 14, seed=9) for i in range(2)}))
    for policy in (SMALL, other):
        with pytest.raises(headwise.MismatchError, match="saved with Less"):
            headwise.HeadwiseCache.load(tmp_path / "cache", model, policy)


def test_offload_and_prefetch_move_the_state():
    model, ids = tiny.llama(layers=2), tiny.prompt(29)
    moved, plain = two_caches(model)
    for cache in (moved, plain):
        logits(model, ids, cache)
    for layer in moved.layers:
        layer.offload()
        layer.prefetch()
    torch.testing.assert_close(logits(model, ids[:, :1], moved), logits(model, ids[:, :1], plain))
    layer = moved.headwise_layers[0]
    layer.device = torch.device("meta")
    layer.prefetch()
    assert {tensor.device.type for tensor in layer.core.evicted.state().values()} == {"meta"}
    # The kernels are not the cache's own.
    assert layer.core.evicted.features.key_in.device.type == "cpu"


# Captured steps.


@pytest.mark.parametrize("prompt", [5, 23], ids=["nothing-yet", "more-and-more"])
def test_a_replayed_step_reads_what_was_folded_in_since(prompt):
    model, ids = tiny.llama(layers=1), tiny.prompt(prompt, batch=2)
    plain, graphed = two_caches(model, SCORED, kernel="reference", evict_every=4, page_size=4)
    for cache in (plain, graphed):
        logits(model, ids, cache)
        assert bool(states(cache)[0]) == (prompt > 9)
    further = tiny.prompt(13, seed=3, batch=2)
    with DecodeGraph(model, graphed, room=7, capture=traced) as graph:
        for new in further.split(1, dim=1):
            torch.testing.assert_close(graph.step(new), logits(model, new, plain)[:, -1], atol=1e-5, rtol=1e-5)
    assert states(plain)[0]["less_sums"].abs().max() > 0.1
    same_states(graphed, plain, 1e-5)


@pytest.mark.parametrize("kernel", ["reference", "cpu"])
def test_a_step_does_not_wait_between_evictions(kernel):
    model, ids = tiny.llama(layers=2), tiny.prompt(30)
    cache = remembering(model, SCORED, evict_every=16, kernel=kernel)
    logits(model, ids, cache)
    assert all(states(cache))
    for _ in range(9):
        logits(model, ids[:, :1], cache)
    with NeverWaits():
        for step in range(9, 15):
            logits(model, ids[:, :1], cache, position_ids=torch.full((1, 1), 30 + step))


# What is refused, and what is only said.


def test_kernels_of_another_model_are_refused():
    kernels = kernels_of(tiny.llama(layers=2), networks_of(tiny.llama(layers=2)))
    with pytest.raises(headwise.MismatchError, match="train some for this model with `headwise train-less`"):
        headwise.HeadwiseCache(tiny.llama(layers=2, seed=1), headwise.Less(SMALL, kernels))


def test_a_policy_that_the_kernels_have_not_seen_is_named():
    model = tiny.llama(layers=2)
    kernels = kernels_of(model, networks_of(model), policies=("h2o:heavy=0.1,recent=0.1",))
    with pytest.warns(headwise.HeadwiseWarning, match="not trained with what StreamingLLM.* evicts"):
        headwise.HeadwiseCache(model, headwise.Less(SMALL, kernels))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        headwise.HeadwiseCache(model, headwise.Less(SCORED, kernels))


def test_a_copy_does_not_repeat_what_was_said():
    model = tiny.llama(layers=2)
    kernels = kernels_of(model, networks_of(model), policies=("h2o:heavy=0.1,recent=0.1",))
    policy = headwise.Quantized(headwise.Less(SMALL, kernels), 8)
    with pytest.warns(headwise.HeadwiseWarning, match="not trained with what StreamingLLM") as said:
        cache = headwise.HeadwiseCache(model, policy)
    assert len(said) == 1
    logits(model, tiny.prompt(40), cache)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = copy.deepcopy(copy.deepcopy(cache))
    same_states(again, cache)
    assert torch.equal(logits(model, tiny.prompt(1), again), logits(model, tiny.prompt(1), cache))


def test_the_report_says_what_is_remembered_and_what_the_kernels_take():
    model = tiny.llama(layers=2)
    networks = networks_of(model)
    cache, plain = remembering(model, SMALL, networks), headwise.HeadwiseCache(model, SMALL, evict_every=1)
    assert cache.report().memory_bytes == 0
    for each in (cache, plain):
        logits(model, tiny.prompt(40, batch=2), each)
    report, without = cache.report(), plain.report()
    # Two sequences, two layers, two KV heads, 4 features of 14 numbers and one more, 4 bytes each.
    state = 2 * 2 * 2 * 4 * 15 * 4
    assert report.memory_bytes == state
    assert [layer.memory_bytes for layer in report.layers] == [state // 2] * 2
    assert report.used_bytes == without.used_bytes + state
    assert report.allocated_bytes == without.allocated_bytes + state
    # Query and key networks, E = 24, R = 4, per layer: 6 (14 E + E R) + 2 (14 E + E R + R²).
    weights = 2 * (6 * (14 * 24 + 24 * 4) + 2 * (14 * 24 + 24 * 4 + 16)) * 4
    assert report.weight_bytes == weights
    assert report.to_dict()["memory_bytes"] == state
    assert report.to_dict()["weight_bytes"] == weights
    assert "remembered" in str(report)
    for said in ("memory_bytes", "weight_bytes"):
        assert said not in without.to_dict()
    assert "remembered" not in str(without)
