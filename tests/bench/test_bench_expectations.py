"""Verdicts on what was expected."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from benching import bench, measured, result_of, stock_measured

from headwise.bench import expectations, plan
from headwise.bench.bandwidth import Ceiling, KernelSpeed
from headwise.bench.expectations import BOUNDLESS, MET, MISSED, NOT_RUN, Expectation
from headwise.bench.record import EXACT, Held, Prefill, PrefillCosts, ProfileCost, Record, Result
from headwise.errors import ConfigurationError

# Expectations.


def judge_one(measure_of, record, bound=2.0, at_least=True):
    return Expectation("it", bound, at_least, "x", measure_of).judge(record)


SPEEDUP = expectations.speedup(8, 4096, torch.float32, "keep 50%")


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
    outlives = expectations.outlives_full(32, 16384, torch.float32, "keep 50%")
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
    share = expectations.kernel_share(8, torch.float32)
    found = Expectation("it", 0.7, True, "%", share).judge(Record(results=results))
    assert (found.verdict, found.measured, found.shown) == (MET, 0.7, "70 %")
    assert Expectation("it", 0.71, True, "%", share).judge(Record(results=results)).verdict == MISSED
    assert Expectation("it", 0.7, True, "%", share).judge(Record(results=results[1:])).verdict == NOT_RUN


def test_peak_is_judged_in_full_layers_beyond_what_is_held_and_what_stock_needs():
    # Four layers of 100 bytes, of which stock needs 50 beside; ours keeps half.
    theirs = stock_measured(prefill=Prefill(1.0, 1, peak_bytes=450), after_prompt=Held(400, 400, 1.0))
    ours = measured(prefill=Prefill(1.0, 1, 0.1, 0.1, 200 + 50 + 150), after_prompt=Held(200, 200, 0.5))
    record = Record(model={"layers": 4}, results=[result_of(1, 512, theirs, ours)])
    excess = expectations.peak_excess(torch.float32)
    found = judge_one(excess, record, 1.5, at_least=False)
    assert (found.verdict, found.measured, found.target) == (MET, 1.5, "<= 1.50x")
    assert judge_one(excess, record, 1.49, at_least=False).verdict == MISSED
    assert judge_one(excess, Record(results=[result_of(1, 512, theirs)])).verdict == NOT_RUN


def test_profile_is_judged_by_medians_and_dtype():
    cost = ProfileCost(2048, "float32", [4.0, 1.0, 100.0], [1.0, 1.0], [0.1])
    share = expectations.profile_share(torch.float32, "exact")
    assert judge_one(share, Record(profile=cost), 0.25, at_least=False).verdict == MET
    assert expectations.profile_share(torch.float32, "sampled")(Record(profile=cost)) == pytest.approx(0.025)
    assert expectations.profile_share(torch.bfloat16, "exact")(Record(profile=cost)) is None
    assert judge_one(share, Record(profile=ProfileCost(2048, "float32"))).verdict == NOT_RUN


def test_kernel_over_codes_is_judged_apart():
    """By its own bound, and from the context on that it is promised for."""
    ceiling, dtype = Ceiling(100.0, "copy"), torch.float32
    exact, codes = measured("a", kernel_speed=kernel(80.0)), {"coded": True, "kernel_speed": kernel(55.0)}
    ran = [exact, measured("keep 50%, int8", **codes), measured("keep 50%, int4, graph", **codes)]
    record = Record(results=[result_of(8, 8192, *ran, dtype=dtype, ceiling=ceiling)])
    for bits, share in ((None, 0.8), ("int8", 0.55), ("int4", 0.55), ("k8v4", None)):
        of = expectations.kernel_share(8, dtype, bits=bits, context=8192)
        assert of(record) == (None if share is None else pytest.approx(share))
    assert expectations.kernel_share(8, dtype, bits="int8", context=8193)(record) is None


def test_a_prefill_is_judged_by_its_median_beyond_stocks():
    costs = PrefillCosts(64, "float32", [1.0, 2.0, 9.0], {EXACT: [3.0, 2.2, 1.0]})
    assert costs.excess(EXACT) == pytest.approx(0.1)
    excess = expectations.prefill_excess(torch.float32, EXACT)
    assert judge_one(excess, Record(prefills=costs), bound=0.15, at_least=False).verdict == MET
    assert judge_one(excess, Record(prefills=costs), bound=0.05, at_least=False).verdict == MISSED
    for nothing in (Record(), Record(prefills=PrefillCosts(64, "float32")), Record(prefills=replace(costs, dtype="x"))):
        assert judge_one(excess, nothing).verdict == NOT_RUN
    assert costs.to_dict()["excess"] == {EXACT: costs.excess(EXACT)}


def test_stock_that_fails_otherwise_has_not_run_out_of_memory():
    outlives = expectations.outlives_full(32, 16384, torch.float32, "keep 50%")
    fails = Record(results=[result_of(32, 16384, stock_measured((), failure="ValueError: no"), measured())])
    assert judge_one(outlives, fails).verdict == NOT_RUN


def test_targets_run_everything_that_is_expected():
    everything = {"prefill": Prefill(1.0, 1, 0.1, 0.1, 9), "after_prompt": Held(9, 9, 1.0), "kernel_speed": kernel(1.0)}
    profile = ProfileCost(2048, "float32", [1.0], [1.0], [1.0])
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        results = []
        for made in plan.targets(device, dtype, "h2o"):
            ran = [measured(c.name, c.kind, coded=c.coded, **everything) for c in made.contenders]
            results.append(Result(made, 1, ran, Ceiling(1.0, "sum")))
        prefills = PrefillCosts(8192, "bfloat16", [1.0], {EXACT: [1.1]})
        verdicts = expectations.judge(Record(results=results, profile=profile, prefills=prefills), device)
        assert verdicts
        assert not [verdict for verdict in verdicts if verdict.verdict == NOT_RUN]
    with pytest.raises(ConfigurationError, match="no targets"):
        plan.targets("mps", torch.float32, "h2o")


def test_targets_are_what_targets_runs(planned):
    assert "one --dtype" in bench("--targets", "--dtype", "float32,bfloat16").err
    answer = bench("--targets", "--shape", "smollm2-135m", "--json")
    assert answer.code == 0, answer.err
    assert [(c.batch, c.context) for c in planned[0].configurations] == [(1, 512), (1, 4096), (8, 4096)]
    assert {verdict["verdict"] for verdict in answer.json["expectations"]} == {NOT_RUN}
