"""The bench is fair: the same model and tokens, turns for everyone, and what is measured is what there is."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from benching import STEPS, TINY, Fake, a_plan, bench, run_by_hand

import tiny
from headwise import HeadwiseCache
from headwise.bench import bandwidth, contenders, workload
from headwise.bench.contender_run import LocalRun
from headwise.bench.kvpress_process import KvpressError
from headwise.bench.models import random_model, share_weights, watched_attention
from headwise.hosts.transformers.model_facts import read_facts
from headwise.measure.model_info import available_bytes, find_shape
from headwise.measure.peak_memory import peak_memory
from headwise.measure.turns import turns

# Fairness.


def test_a_twin_shares_its_weights_and_keeps_its_own_attention():
    model = tiny.llama()
    ids = tiny.prompt(12)
    expected = model(input_ids=ids).logits
    one, other = share_weights(model), share_weights(model)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        for made in (one, other):
            assert dict([*made.named_parameters(), *made.named_buffers()])[name] is tensor
    cache = HeadwiseCache(one, contenders.full().policy)
    assert other.get_decoder().config._attn_implementation == "sdpa"
    with torch.inference_mode():
        one(input_ids=ids, past_key_values=cache)
    assert torch.equal(other(input_ids=ids).logits, expected)
    assert cache.get_seq_length() == 12


def test_a_twin_runs_sdpa_whatever_its_model_runs():
    model = tiny.llama()
    model.set_attn_implementation("eager")
    assert share_weights(model).get_decoder().config._attn_implementation == "sdpa"
    assert model.get_decoder().config._attn_implementation == "eager"


@pytest.mark.parametrize("contender", [contenders.stock(), contenders.full()], ids=["stock", "full"])
def test_taking_a_step_apart_leaves_the_cache_as_it_was(contender):
    local = LocalRun(contender, tiny.llama(), None, a_plan())
    ids = tiny.prompt(16)
    local.prefill(ids[:, :12])
    before = set(vars(local._cache))
    assert 0 < local.attention_share(ids[:, 12:14]) < 1
    assert set(vars(local._cache)) == before
    assert local._cache.get_seq_length() == 14


def test_the_wrapper_that_times_attention_is_taken_off_again():
    model = tiny.llama()
    cache = HeadwiseCache(model, contenders.full().policy)
    calls = []

    def watch(function):
        return lambda *args, **kwargs: (calls.append(1), function(*args, **kwargs))[1]

    with watched_attention(model, watch):
        model(input_ids=tiny.prompt(5))
        assert len(calls) == 3
        model(input_ids=tiny.prompt(5), past_key_values=cache)
        assert len(calls) == 6
    model(input_ids=tiny.prompt(5))
    model(input_ids=tiny.prompt(5, batch=1)[:, :1], past_key_values=cache)
    assert len(calls) == 6


def test_a_captured_contender_decodes_as_the_plain_one():
    """Without a GPU the step is run again instead of replayed; the cache is held the same way."""
    plan = replace(a_plan(), capture=lambda step: step)
    plain = contenders.keeping("h2o", 0.5, 40)
    ids, model = tiny.prompt(70, batch=2), tiny.llama()
    held = []
    for contender in (plain, contenders.with_graph(plain)):
        local = LocalRun(contender, model, None, plan)
        local.prefill(ids[:, :40])
        local.decode(ids[:, 40:57])
        local.decode(ids[:, 57:])
        held.append(local.held())
        share = local.attention_share(ids[:, :2]) if contender is plain else local.attention_share(ids[:, :0])
        assert (share is None) == contender.graph
    assert contenders.with_graph(plain).name == "keep 50%, graph"
    assert held[0].used_bytes == held[1].used_bytes
    assert held[0].kept_ratio == held[1].kept_ratio


def test_a_graph_needs_a_gpu():
    assert "--graph needs a GPU, not cpu" in bench("--shape", "tiny", "--graph", "--device", "cpu").err


@pytest.mark.parametrize("count", [1, 2, 5])
def test_everyone_has_a_turn_in_every_round_and_nobody_is_always_first(count):
    orders = [turns(range(count), number) for number in range(2 * count)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    assert [order[0] for order in orders] == [*range(count)] * 2


def test_rounds_alternate_and_the_warm_up_does_not_count():
    log = []
    fakes = [Fake(name, log) for name in "abc"]
    result, ids = run_by_hand(*fakes)
    prefills = [entry for entry in log if entry[1] == "prefill"]
    assert prefills == [(name, "prefill", (2, 128), 1) for name in "abc"] + [
        (name, "prefill", (2, 200), 1) for name in "abc"
    ]
    # A short one to wake up; then a round that is not counted, and those that are.
    assert "".join(name for name, what, *_ in log if what == "decode") == "abc" + "abc" + "bca" + "cab"
    for measurement in result.measurements:
        assert measurement.round_seconds == [3.0, 4.0]
    for fake in fakes:
        assert torch.equal(torch.cat(fake.fed[1:], dim=1), ids[:, 200 : 200 + 3 * STEPS])


def test_repeated_sequences_are_fed_what_they_repeat():
    fake = Fake("a", [])
    _, ids = run_by_hand(fake, batch=4, distinct=2)
    assert fake.log[1][1:] == ("decode",)
    assert fake.log[2] == ("a", "prefill", (2, 200), 2)
    assert torch.equal(fake.fed[1], ids[[0, 0, 1, 1], 200 : 200 + STEPS])


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "out of memory"),
        (KvpressError("it is gone"), "it is gone"),
    ],
)
def test_who_cannot_go_on_is_left_out_and_the_others_go_on(error, says):
    log = []
    result, _ = run_by_hand(Fake("a", log), Fake("b", log, fails_at=3, error=error))
    first, second = result.measurements
    assert (first.failure, first.round_seconds) == (None, [3.0, 4.0])
    assert (second.failure, second.round_seconds) == (says, [])
    assert [entry for entry in log if entry[0] == "b"][-2:] == [("b", "decode"), ("b", "close")]
    assert result.ratios(second) == []


def test_another_error_is_not_hidden():
    with pytest.raises(RuntimeError, match="a bug"):
        run_by_hand(Fake("a", [], fails_at=2, error=RuntimeError("a bug")))


# What is measured.


def test_peak_is_the_most_that_was_allocated_at_once(capfd):
    million = 2**20
    before = torch.zeros(million)
    with peak_memory(torch.device("cpu")) as peak:
        one = torch.zeros(million)  # 4 MiB
        two = torch.zeros(2 * million)  # 12
        del one  # 8
        three = torch.zeros(million // 2)  # 10
        assert peak.bytes is None
        del two, three
        four = before + before  # 4
    assert peak.bytes == 12 * million
    assert four.nbytes == 4 * million
    os.write(2, b"heard")
    assert capfd.readouterr().err == "heard"


def test_peak_counts_what_an_operation_needs_for_itself():
    numbers = torch.randn(2**18)
    with peak_memory(torch.device("cpu")) as peak:
        numbers.sort()
    assert peak.bytes >= (4 + 8) * 2**18


def test_peak_of_what_fails_is_unknown():
    with pytest.raises(ValueError, match="stop"), peak_memory(torch.device("cpu")) as peak:
        raise ValueError("stop")
    assert peak.bytes is None


def test_ceiling_takes_the_fastest_way_to_read():
    assert bandwidth.measure_ceiling(torch.device("cpu"), 2**20).bytes_per_second > 0


def test_kernel_speed_leaves_the_cache_as_it_is():
    local = LocalRun(contenders.keeping("h2o", 0.5, 40), tiny.llama(), None, a_plan())
    ids = tiny.prompt(60, batch=2)
    local.prefill(ids[:, :40])
    held = local.held()
    speed = local.kernel_speed()
    assert speed.bytes == 2 * 3 * 2 * 20 * 2 * 14 * 4
    assert speed.best >= speed.median > 0
    assert local.held() == held
    assert local.decode(ids[:, 40:]) > 0


@pytest.mark.parametrize(("text", "count"), [("32768K", 2**25), ("1M", 2**20), ("512", 512)])
def test_sizes_as_linux_writes_them(text, count):
    assert bandwidth._bytes_of(text) == count


@pytest.mark.parametrize("policy", ["h2o", "streamingllm", "window", "random"])
@pytest.mark.parametrize("context", [40, 97])
@pytest.mark.parametrize("keep", [0.25, 0.5, 1.0])
def test_what_was_asked_for_is_kept_to_the_row(policy, context, keep):
    local = LocalRun(contenders.keeping(policy, keep, context), tiny.llama(layers=1), None, a_plan())
    local.prefill(tiny.prompt(context))
    assert abs(local.held().kept_ratio * context - keep * context) <= 1


# The workload.


def test_text_is_another_in_every_sequence_and_begins_anew_where_it_ends():
    ids = workload.text_ids(lambda text, add_special_tokens: {"input_ids": list(range(10))}, 3, 12)
    assert ids.tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1],
        [3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4],
        [6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7],
    ]


def test_random_ids_are_always_the_same():
    ids = workload.random_ids(50, 2, 30)
    assert torch.equal(ids, workload.random_ids(50, 2, 30))
    assert ids.shape == (2, 30)
    assert 0 <= int(ids.min()) < int(ids.max()) < 50


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("smollm2-135m", 134_515_008),
        ("llama-7b", 6_738_415_616),
        ("llama-3-8b", 8_030_261_248),
        ("llama-3.2-1b", 1_235_814_400),
        ("mistral-7b", 7_248_023_552),
        # Without its biases.
        ("qwen2.5-7b", 7_615_616_512 - 28 * (3584 + 2 * 512)),
    ],
)
def test_shapes_have_as_many_weights_as_the_models_they_are_named_after(name, parameters):
    assert find_shape(name).parameters == parameters


def test_random_model_has_the_shape_and_the_dtype():
    model = random_model(TINY, torch.bfloat16, torch.device("cpu"))
    assert sum(parameter.numel() for parameter in model.parameters()) == TINY.parameters
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert read_facts(model)[0].token_bytes(torch.bfloat16) == TINY.row_bytes(torch.bfloat16)
    assert not model.training


def test_available_memory_is_asked_of_the_system():
    assert 2**20 < available_bytes(torch.device("cpu")) < 2**50
