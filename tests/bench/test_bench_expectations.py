"""Verdicts on what was expected."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from benching import bench, measured, result_of, stock_measured

from headwise.bench import expectations, figures, plan, prefill
from headwise.bench.bandwidth import Ceiling, KernelSpeed
from headwise.bench.contenders import ALONE
from headwise.bench.expectations import MET, MISSED, NOT_RUN, Expectation
from headwise.bench.figures import BOUNDLESS
from headwise.bench.record import EXACT, Held, Prefill, PrefillCosts, Record, Result
from headwise.errors import ConfigurationError

# Expectations.


def judge_one(measure_of, record, bound=2.0, at_least=True):
    return Expectation("it", bound, at_least, "x", measure_of).judge(record)


SPEEDUP = figures.speedup(8, 4096, torch.float32, "keep 50%")


@pytest.mark.parametrize(
    ("ours", "verdict"), [(1.0, MET), (0.9, MET), (1.0001, MISSED)], ids=["exactly", "more", "a hair less"]
)
def test_speed_is_judged_at_the_boundary(ours, verdict):
    found = judge_one(SPEEDUP, Record(results=[result_of(8, 4096, stock_measured(), measured(rounds=[ours]))]))
    assert (found.verdict, found.measured) == (verdict, 2.0 / ours)
    assert found.target == ">= 2.00x"


def test_speed_is_the_median_of_the_ratios_of_rounds():
    record = Record(results=[result_of(8, 4096, stock_measured([2.0, 4.0, 9.0]), measured(rounds=[1.0, 1.0, 9.0]))])
    assert judge_one(SPEEDUP, record).measured == 2.0


@pytest.mark.parametrize(
    "results",
    [
        [],
        [result_of(1, 4096, stock_measured(), measured())],
        [result_of(8, 512, stock_measured(), measured())],
        [result_of(8, 4096, stock_measured(), measured("keep 25%"))],
        [result_of(8, 4096, stock_measured(), measured(), dtype=torch.bfloat16)],
        [result_of(8, 4096, stock_measured(), measured(failure="out of memory"))],
        [result_of(8, 4096, stock_measured(), measured(rounds=()))],
        [result_of(8, 4096, stock_measured(()), measured())],
    ],
    ids=["nothing", "batch", "context", "candidate", "dtype", "failed", "broken off", "no stock"],
)
def test_what_was_not_run_is_not_judged(results):
    found = judge_one(SPEEDUP, Record(results=results))
    assert (found.verdict, found.measured) == (NOT_RUN, None)


def test_running_where_stock_does_not_fit_is_as_good_as_any_speed():
    outlives = figures.outlives_full(32, 16384, torch.float32, "keep 50%")
    fails = Record(results=[result_of(32, 16384, stock_measured((), failure="out of memory"), measured())])
    found = judge_one(outlives, fails, bound=4.0)
    assert (found.verdict, found.measured, found.shown) == (MET, BOUNDLESS, "stock's cache does not fit")
    runs = Record(results=[result_of(32, 16384, stock_measured(), measured())])
    assert judge_one(outlives, runs, bound=4.0).verdict == MISSED
    assert judge_one(outlives, Record()).verdict == NOT_RUN


def kernel(best, beyond=True):
    return KernelSpeed(100, best, best, beyond)


def test_kernel_is_judged_by_its_worst_of_exact_rows_beyond_the_processors_cache():
    ceiling = Ceiling(100.0, "sum")
    fast, slow = measured("a", kernel_speed=kernel(90.0)), measured("b", kernel_speed=kernel(70.0))
    inside, short = measured("c", kernel_speed=kernel(10.0, False)), measured("d", kernel_speed=kernel(5.0))
    codes = measured("e", kernel_speed=kernel(20.0), coded=True)
    results = [
        result_of(8, 1024, fast, slow, inside, codes, ceiling=ceiling),
        result_of(8, 1023, short, ceiling=ceiling),
        result_of(1, 4096, short, ceiling=ceiling),
    ]
    share = figures.kernel_share(8, torch.float32)
    found = Expectation("it", 0.7, True, "%", share).judge(Record(results=results))
    assert (found.verdict, found.measured, found.shown) == (MET, 0.7, "70 %")
    assert Expectation("it", 0.71, True, "%", share).judge(Record(results=results)).verdict == MISSED
    assert Expectation("it", 0.7, True, "%", share).judge(Record(results=results[1:])).verdict == NOT_RUN


def test_peak_is_judged_in_full_layers_beyond_what_is_held_and_what_stock_needs():
    # Four layers of 100 bytes, of which stock needs 50 beside; ours keeps half.
    theirs = stock_measured(prefill=Prefill(1.0, 1, peak_bytes=450), after_prompt=Held(400, 400, 1.0))
    ours = measured(prefill=Prefill(1.0, 1, 0.1, 0.1, 200 + 50 + 150), after_prompt=Held(200, 200, 0.5))
    record = Record(model={"layers": 4}, results=[result_of(1, 512, theirs, ours)])
    excess = figures.peak_excess(torch.float32)
    found = judge_one(excess, record, 1.5, at_least=False)
    assert (found.verdict, found.measured, found.target) == (MET, 1.5, "<= 1.50x")
    assert judge_one(excess, record, 1.49, at_least=False).verdict == MISSED
    assert judge_one(excess, Record(results=[result_of(1, 512, theirs)])).verdict == NOT_RUN


def test_a_step_is_judged_against_what_it_takes_at_least():
    """The model alone takes 4 ms, and reading 100 bytes at 100 per second a second."""
    ours = measured(rounds=(2.0, 1.25, 9.0), after_prompt=Held(100, 900, 0.5))
    alone = measured(ALONE, rounds=(0.004, 1.0, 0.001))
    result = replace(result_of(1, 512, stock_measured((1.0, 1.0, 1.5)), ours, ceiling=Ceiling(100.0, "sum")), own=alone)
    assert result.bound_ms(ours) == pytest.approx(1004)
    assert result.stock_spread == pytest.approx(0.5)
    record = Record(results=[result])
    share = figures.bound_share(1, 512, torch.float32, "keep 50%")
    assert share(record) == pytest.approx(1.004 / 2)
    assert judge_one(share, Record(results=[replace(result, own=None)])).verdict == NOT_RUN
    over = figures.step_over(1, 512, torch.float32, "keep 50%", ALONE)
    assert over(record) == pytest.approx(500)
    assert figures.step_over(1, 512, torch.float32, "keep 25%", ALONE)(record) is None


def test_the_slowest_policy_is_judged():
    ran = [measured("full", rounds=(1.0, 2.0)), measured("a", rounds=(1.1, 2.0)), measured("b", rounds=(0.5, 2.8))]
    slowest = figures.step_over(1, 4096, torch.float32, None, "full")
    record = Record(results=[result_of(1, 4096, stock_measured((9.0, 9.0)), *ran)])
    assert slowest(record) == pytest.approx(1.05)
    assert slowest(Record(results=[result_of(1, 4096, *ran[1:])])) is None


def test_time_of_the_kernel_is_compared_over_the_same_rows():
    full, codes = measured("full", kernel_speed=KernelSpeed(400, 9.0, 100.0, True)), KernelSpeed(100, 9.0, 50.0, True)
    record = Record(results=[result_of(8, 4096, full, measured("full, int8", kernel_speed=codes, coded=True))])
    time = figures.kernel_time(8, 4096, torch.float32, "full, int8")
    assert time(record) == pytest.approx(0.5)
    assert figures.kernel_time(8, 2048, torch.float32, "full, int8")(record) is None


def test_kernel_over_codes_is_judged_apart():
    """By its own bound, and from the context on that it is promised for."""
    ceiling, dtype = Ceiling(100.0, "copy"), torch.float32
    exact, codes = measured("a", kernel_speed=kernel(80.0)), {"coded": True, "kernel_speed": kernel(55.0)}
    ran = [exact, measured("keep 50%, int8", **codes), measured("keep 50%, int4, graph", **codes)]
    record = Record(results=[result_of(8, 8192, *ran, dtype=dtype, ceiling=ceiling)])
    for bits, share in ((None, 0.8), ("int8", 0.55), ("int4", 0.55), ("k8v4", None)):
        of = figures.kernel_share(8, dtype, bits=bits, context=8192)
        assert of(record) == (None if share is None else pytest.approx(share))
    assert figures.kernel_share(8, dtype, bits="int8", context=8193)(record) is None


def test_a_prefill_is_judged_by_its_median_beyond_stocks():
    costs = PrefillCosts(64, "float32", [1.0, 2.0, 9.0], {EXACT: [3.0, 2.2, 1.0]})
    assert costs.excess(EXACT) == pytest.approx(0.1)
    excess = figures.prefill_excess(torch.float32, EXACT)
    assert judge_one(excess, Record(prefills=costs), bound=0.15, at_least=False).verdict == MET
    assert judge_one(excess, Record(prefills=costs), bound=0.05, at_least=False).verdict == MISSED
    for nothing in (Record(), Record(prefills=PrefillCosts(64, "float32")), Record(prefills=replace(costs, dtype="x"))):
        assert judge_one(excess, nothing).verdict == NOT_RUN
    assert costs.to_dict()["excess"] == {EXACT: costs.excess(EXACT)}


def test_stock_that_fails_otherwise_has_not_run_out_of_memory():
    outlives = figures.outlives_full(32, 16384, torch.float32, "keep 50%")
    fails = Record(results=[result_of(32, 16384, stock_measured((), failure="ValueError: no"), measured())])
    assert judge_one(outlives, fails).verdict == NOT_RUN


def test_targets_run_everything_that_is_expected():
    everything = {"prefill": Prefill(1.0, 1, 0.1, 0.1, 9), "after_prompt": Held(9, 9, 1.0), "kernel_speed": kernel(1.0)}
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        results = []
        for made in plan.targets(device, dtype, "h2o"):
            ran = [measured(c.name, c.kind, coded=c.coded, **everything) for c in made.contenders]
            results.append(Result(made, 1, ran, Ceiling(1.0, "sum"), measured(ALONE, rounds=[1.0])))
        looks = prefill._LOOKS if device == "cuda" else prefill._LOOKS_OF_A_MODEL
        prefills = PrefillCosts(8192, str(dtype).removeprefix("torch."), [1.0], {look: [1.1] for look in looks})
        verdicts = expectations.judge(Record(results=results, prefills=prefills), device)
        assert verdicts
        assert not [verdict for verdict in verdicts if verdict.verdict == NOT_RUN]
    with pytest.raises(ConfigurationError, match="no targets"):
        plan.targets("mps", torch.float32, "h2o")


def test_more_is_expected_of_codes_where_the_processor_multiplies_them():
    with_bytes = expectations.judge(Record(machine={"instructions": "avx512"}), "cpu")
    without = expectations.judge(Record(machine={"instructions": "avx2"}), "cpu")
    assert [v.target for v in without] == [v.target for v in expectations.judge(Record(), "cpu")]
    other = [(a.target, b.target) for a, b in zip(with_bytes, without, strict=True) if a != b]
    assert other == [("<= 0.28x", "<= 0.40x"), ("<= 0.24x", "<= 0.38x")]


def test_targets_are_what_targets_runs(planned):
    assert "one --dtype" in bench("--targets", "--dtype", "float32,bfloat16").err
    answer = bench("--targets", "--shape", "smollm2-135m", "--json")
    assert answer.code == 0, answer.err
    assert [(c.batch, c.context) for c in planned[0].configurations] == [(1, 512), (1, 4096), (8, 4096)]
    assert {verdict["verdict"] for verdict in answer.json["expectations"]} == {NOT_RUN}
