"""Caches that remember what they evict, pass by pass against the definition of LESS."""

from __future__ import annotations

import pytest
import torch

import headwise
import models
import tiny
from cases import EVERYTHING, singly
from every_policy import EVERY
from less_caches import SCORED, SMALL, TOKENIZER, batch, logits, remembering, states, step_by_step
from less_oracle import close, kernels_of, networks_of, use_less_oracle, watch
from models import MIXED, MODES
from oracle import rows_of
from passes import play

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
