"""The bench: its arithmetic, its fairness, its verdicts and what it prints; never how fast anything is."""

from __future__ import annotations

import contextlib
import io
import json
import os
import statistics
import sys
import textwrap
import types
from dataclasses import dataclass
from functools import partial

import matplotlib.image
import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import headwise
import tiny
from headwise import FastGen, HeadwiseCache
from headwise.bench import bandwidth, candidates, expectations, kvpress_peer, plan, run, shapes, stock, workload
from headwise.bench.bandwidth import Ceiling, KernelSpeed
from headwise.bench.candidates import Candidate
from headwise.bench.contestant import Contestant, Local
from headwise.bench.expectations import BOUNDLESS, MET, MISSED, NOT_RUN, Expectation
from headwise.bench.measure import measure, turns
from headwise.bench.memory import peak_memory
from headwise.bench.peer import Peer, PeerError, Remote
from headwise.bench.picture import save_picture
from headwise.bench.plan import Configuration, Plan
from headwise.bench.record import Held, Measurement, Prefill, ProfileCost, Record, Result
from headwise.cli.main import main
from headwise.errors import CacheStateError, ConfigurationError, InputError
from headwise.hf.budget import row_bytes

TINY = shapes.SHAPES["tiny"]
STEPS, ROUNDS = 4, 2
ROW = 2 * TINY.head_dim * 4  # key and value in fp32


@dataclass
class Answer:
    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


def call(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as left:
        main(["bench", *(str(argument) for argument in arguments)])
    return Answer(left.value.code, out.getvalue(), err.getvalue())


def small(*more):
    rounds = ("--steps", STEPS, "--rounds", ROUNDS, "--evict-every", STEPS)
    return ("--shape", "tiny", "--context", 24, "--keep", 0.5, *rounds, *more)


@pytest.fixture(scope="module", autouse=True)
def quick_ceiling():
    """A buffer that the processor's cache holds: what it yields is not looked at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headwise.bench.measure.measure_ceiling", partial(bandwidth.measure_ceiling, size=2**16))
        yield


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    return tmp_path_factory.mktemp("picture") / "speed.png"


@pytest.fixture(scope="module")
def told(picture):
    """One run, whose JSON and picture several tests look at."""
    answer = call(*small("--context", "24,40", "--batch", 2, "--keep", "0.5,0.25", "--json", "--png", picture))
    assert answer.code == 0, answer.err
    return answer


@pytest.fixture
def planned(monkeypatch):
    """Plans that the command line makes, none of which is run."""
    plans = []
    monkeypatch.setattr(run, "run", lambda made, *rest: plans.append(made))
    return plans


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model that has a tokenizer."""
    path = tmp_path_factory.mktemp("model")
    tiny.llama(heads=4, kv_heads=2, layers=2, head_dim=8).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


# What JSON says.


def test_json_is_one_object_of_this_schema(told):
    found = told.json
    assert set(found) == {
        "versions",
        "machine",
        "model",
        "settings",
        "notes",
        "interrupted",
        "results",
        "profile",
        "written_for",
        "expectations",
    }
    assert set(found["versions"]) == {"headwise", "python", "torch", "transformers"}
    assert found["machine"]["device"] == "cpu"
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert found["model"]["parameters"] == TINY.parameters
    assert found["settings"]["rounds"] == ROUNDS
    assert not found["interrupted"]
    assert [(r["batch"], r["context"], r["dtype"]) for r in found["results"]] == [
        (2, 24, "float32"),
        (2, 40, "float32"),
    ]
    for result in found["results"]:
        assert [c["name"] for c in result["candidates"]] == ["stock", "full", "keep 50%", "keep 25%"]
        assert result["ceiling"]["bytes_per_second"] > 0
    *others, peak = found["expectations"]
    assert [verdict["verdict"] for verdict in others] == [NOT_RUN] * 8
    # Toy layers are smaller than what any pass needs for itself: either verdict is right that follows from the figure.
    assert peak["verdict"] == (MET if peak["measured"] <= 1.5 else MISSED)


def test_progress_goes_to_standard_error(told):
    assert "keep 25% reads the prompt" in told.err
    assert "round 2 of 2" in told.err


def test_figures_follow_from_the_rounds(told):
    for result in told.json["results"]:
        rival = result["candidates"][0]
        assert rival["ratio_to_stock"] == {"median": 1, "least": 1, "most": 1}
        for candidate in result["candidates"]:
            seconds = candidate["round_seconds"]
            assert len(seconds) == ROUNDS
            speeds = [2 * STEPS / taken for taken in seconds]
            ratios = [theirs / ours for theirs, ours in zip(rival["round_seconds"], seconds, strict=True)]
            for name, values in (("tokens_per_second", speeds), ("ratio_to_stock", ratios)):
                expected = {"median": statistics.median(values), "least": min(values), "most": max(values)}
                assert candidate[name] == pytest.approx(expected)
            assert candidate["step_ms"] == pytest.approx(statistics.median(seconds) / STEPS * 1000)
            assert 0 < candidate["attention_share"] < 1
            assert candidate["attention_ms"] + candidate["rest_ms"] == pytest.approx(candidate["step_ms"])
            prefill = candidate["prefill"]
            assert prefill["tokens"] == 2 * result["context"]
            assert candidate["prefill_tokens_per_second"] == pytest.approx(prefill["tokens"] / prefill["seconds"])
            if candidate["kind"] == "headwise":
                share = prefill["profile_seconds"] / rival["prefill"]["seconds"]
                assert candidate["profile_share_of_stock_prefill"] == pytest.approx(share)
                kernel = candidate["kernel_speed"]["best"] / result["ceiling"]["bytes_per_second"]
                assert candidate["kernel_share_of_ceiling"] == pytest.approx(kernel)


def test_bytes_are_those_of_caches_made_without_the_bench(told):
    for result in told.json["results"]:
        context, decoded = result["context"], STEPS * (ROUNDS + 2)
        rows = 2 * TINY.layers * TINY.kv_heads
        for candidate in result["candidates"]:
            after = candidate["after_prompt"]
            if candidate["kind"] == "stock":
                assert after["used_bytes"] == after["allocated_bytes"] == rows * context * ROW
                assert candidate["after_decode"]["used_bytes"] == rows * (context + decoded) * ROW
                continue
            # Sizes do not depend on the weights: the rules keep a number of rows.
            model = LlamaForCausalLM(LlamaConfig(**stock.llama_dimensions(TINY))).eval()
            policy = candidates.kept("h2o", candidate["keep"], context).policy
            policy = candidates.full().policy if candidate["name"] == "full" else policy
            cache = HeadwiseCache(model, policy, evict_every=STEPS)
            ids = workload.random_ids(TINY.vocabulary, 2, context + decoded)
            with torch.inference_mode():
                model(input_ids=ids[:, :context], past_key_values=cache, use_cache=True)
                report = cache.report()
                assert after["used_bytes"] == report.used_bytes
                assert after["allocated_bytes"] == report.allocated_bytes
                assert after["kept_ratio"] == report.kept_ratio
                for column in ids[:, context:].split(1, dim=1):
                    model(input_ids=column, past_key_values=cache, use_cache=True)
            assert candidate["after_decode"]["allocated_bytes"] == cache.report().allocated_bytes
            assert candidate["kernel"] == cache.kernel


def test_kernel_reads_the_rows_that_are_kept_at_the_end(told):
    for result in told.json["results"]:
        tokens = result["context"] + STEPS * (ROUNDS + 2)
        for candidate in result["candidates"][1:]:
            rows = 2 * TINY.layers * TINY.kv_heads * tokens
            assert candidate["kernel_speed"]["bytes"] == pytest.approx(
                candidate["after_decode"]["kept_ratio"] * rows * ROW
            )


def test_table_shows_every_candidate_and_every_expectation(fake_python, monkeypatch):
    monkeypatch.setattr(stock, "QuantizedCache", lambda *_: (_ for _ in ()).throw(ValueError("no such backend")))
    python = fake_python("load", {"error": "ModuleNotFoundError: No module named 'kvpress'"})
    answer = call(*small("--quantized", "fp8", "--kvpress", python))
    assert answer.code == 0
    for word in ("stock", "full", "keep 50%", "x stock", "prefill", "memory gives", "not run", "written for"):
        assert word in answer.out
    for expectation in expectations.EXPECTATIONS["cpu"]:
        assert expectation.name in answer.out
    # Who could not run is a line, not a crash.
    assert "quantized fp8: no such backend" in answer.out
    assert "kvpress 50%: ModuleNotFoundError: No module named 'kvpress'" in answer.out
    assert "…" not in answer.out


def test_distinct_sequences_are_read_and_the_others_repeat_them():
    found = call(*small("--batch", 4, "--distinct", 2, "--json")).json["results"][0]
    for candidate in found["candidates"]:
        assert candidate["prefill"]["tokens"] == 2 * 24
    rows = 4 * TINY.layers * TINY.kv_heads
    assert found["candidates"][0]["after_prompt"]["used_bytes"] == rows * 24 * ROW
    assert found["candidates"][1]["kernel_speed"]["bytes"] == rows * (24 + STEPS * (ROUNDS + 2)) * ROW


def test_a_model_with_a_tokenizer_reads_text_and_can_be_profiled(folder, monkeypatch):
    for module in (plan, run):
        monkeypatch.setattr(module, "PROFILE_CONTEXT", 32)
    arguments = ("--model", folder, "--context", 32, "--keep", 0.5, "--recovery", 0.9, "--steps", 2, "--rounds", 1)
    found = call(*arguments, "--json").json
    names = [candidate["name"] for candidate in found["results"][0]["candidates"]]
    assert names == ["stock", "full", "keep 50%", "FastGen 0.9"]
    assert found["results"][0]["candidates"][-1]["setting"] == str(FastGen(0.9))
    cost = found["profile"]
    assert cost["exact_share"] == pytest.approx(cost["exact_seconds"][0] / cost["stock_seconds"][0])
    verdicts = {verdict["name"].split(",")[0]: verdict for verdict in found["expectations"]}
    assert verdicts["exact profile"]["measured"] == cost["exact_share"]
    assert verdicts["sampled profile"]["measured"] == cost["sampled_share"]


def test_interrupt_shows_what_there_is(monkeypatch):
    def broken_off(pairs, result, *rest):
        for _, measurement in pairs:
            measurement.round_seconds.append(1.0)
            measurement.prefill = Prefill(1.0, 10)
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "measure", broken_off)
    answer = call(*small("--json"))
    assert answer.code == 130
    assert answer.err.endswith("interrupted\n")
    assert answer.json["interrupted"]
    assert [c["round_seconds"] for c in answer.json["results"][0]["candidates"]] == [[1.0]] * 3
    assert answer.json["results"][0]["candidates"][0]["after_prompt"] is None
    shown = call(*small())
    assert shown.code == 130
    assert "4.0..4.0" in shown.out


# Quantized caches.


def test_a_quantized_cache_that_is_not_installed_is_named(monkeypatch, planned):
    monkeypatch.setattr(stock, "_importable", lambda module: False)
    assert stock.find_backend("auto") == (None, "not installed (pip install optimum-quanto)")
    assert stock.find_backend("hqq") == (None, "not installed (pip install hqq)")
    assert stock.find_backend("none") == (None, None)
    assert "quantized: not installed (pip install optimum-quanto)" in call(*small()).out


def test_the_first_backend_that_is_installed_is_taken(monkeypatch):
    monkeypatch.setattr(stock, "_importable", lambda module: module == "hqq")
    assert stock.find_backend("auto") == ("hqq", None)


def test_bytes_of_a_quantized_cache_are_those_inside_its_tensors():
    model = stock.random_model(TINY, torch.float32, torch.device("cpu"))
    try:
        cache = stock.quantized_cache(model, "fp8")
    except ConfigurationError:
        pytest.skip("this release of transformers has no fp8 cache")
    local = Local(candidates.quantized("fp8"), model, None, a_plan())
    local.prefill(workload.random_ids(TINY.vocabulary, 2, 20))
    numbers = 2 * TINY.layers * 2 * TINY.kv_heads * 20 * TINY.head_dim
    scales = 2 * TINY.layers * 4
    assert local.held() == Held(numbers + scales, numbers + scales, 1.0)
    assert stock.tensors_of(cache) == []


class Packed(torch.Tensor):
    """A tensor that only stands for others, as those of quantization libraries do."""

    @staticmethod
    def __new__(cls, inside):
        return torch.Tensor._make_wrapper_subclass(cls, (100, 100))

    def __init__(self, inside):
        self.inside = inside

    def __tensor_flatten__(self):
        return ["inside"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError


def test_what_a_tensor_stands_for_is_counted_instead_of_it():
    inside, scale = torch.zeros(7), torch.zeros(3)
    layer = types.SimpleNamespace(keys=Packed(inside), values=(Packed(inside), {"scale": scale}), bits=4)
    cache = DynamicCache()
    cache.layers = [layer]
    found = stock.tensors_of(cache)
    assert [id(tensor) for tensor in found] == [id(inside), id(inside), id(scale)]


# Fairness.


def a_plan(*configurations):
    return Plan(configurations, STEPS, ROUNDS, kernel="auto", evict_every=STEPS, profile_repeats=0)


def test_a_twin_shares_its_weights_and_keeps_its_own_attention():
    model = tiny.llama()
    ids = tiny.prompt(12)
    expected = model(input_ids=ids).logits
    one, other = stock.twin(model), stock.twin(model)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        for made in (one, other):
            assert dict([*made.named_parameters(), *made.named_buffers()])[name] is tensor
    cache = HeadwiseCache(one, candidates.full().policy)
    assert one.get_decoder().config._attn_implementation == "headwise"
    assert other.get_decoder().config._attn_implementation == "sdpa"
    with torch.inference_mode():
        one(input_ids=ids, past_key_values=cache)
    assert torch.equal(other(input_ids=ids).logits, expected)
    assert cache.get_seq_length() == 12


def test_a_twin_runs_sdpa_whatever_its_model_runs():
    model = tiny.llama()
    model.set_attn_implementation("eager")
    assert stock.twin(model).get_decoder().config._attn_implementation == "sdpa"
    assert model.get_decoder().config._attn_implementation == "eager"


@pytest.mark.parametrize("candidate", [candidates.stock(), candidates.full()], ids=["stock", "full"])
def test_taking_a_step_apart_leaves_the_cache_as_it_was(candidate):
    local = Local(candidate, tiny.llama(), None, a_plan())
    ids = tiny.prompt(16)
    local.prefill(ids[:, :12])
    before = set(vars(local._cache))
    assert 0 < local.attention_share(ids[:, 12:14]) < 1
    assert set(vars(local._cache)) == before
    assert local._cache.get_seq_length() == 14


def test_the_wrapper_that_times_attention_is_taken_off_again():
    model = tiny.llama()
    calls = []

    def watch(function):
        return lambda *args, **kwargs: (calls.append(1), function(*args, **kwargs))[1]

    with stock.watched_attention(model, watch):
        model(input_ids=tiny.prompt(5))
    assert len(calls) == 3
    model(input_ids=tiny.prompt(5))
    assert len(calls) == 3


def test_a_captured_candidate_decodes_as_the_plain_one(monkeypatch):
    """Without a GPU the step is run again instead of replayed; the cache is held the same way."""
    graph_of = partial(headwise.DecodeGraph, capture=lambda step: step)
    monkeypatch.setattr(headwise, "DecodeGraph", graph_of)
    plain = candidates.kept("h2o", 0.5, 40)
    ids, model = tiny.prompt(70, batch=2), tiny.llama()
    held = []
    for candidate in (plain, candidates.captured(plain)):
        local = Local(candidate, model, None, a_plan())
        local.prefill(ids[:, :40])
        local.decode(ids[:, 40:57])
        local.decode(ids[:, 57:])
        held.append(local.held())
        share = local.attention_share(ids[:, :2]) if candidate is plain else local.attention_share(ids[:, :0])
        assert (share is None) == candidate.graph
    assert candidates.captured(plain).name == "keep 50%, graph"
    assert held[0].used_bytes == held[1].used_bytes
    assert held[0].kept_ratio == held[1].kept_ratio


def test_a_graph_needs_a_gpu():
    assert "--graph needs a GPU, not cpu" in call("--shape", "tiny", "--graph", "--device", "cpu").err


@pytest.mark.parametrize("count", [1, 2, 5])
def test_everyone_has_a_turn_in_every_round_and_nobody_is_always_first(count):
    orders = [turns(range(count), number) for number in range(2 * count)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    assert [order[0] for order in orders] == [*range(count)] * 2


class Fake(Contestant):
    """Writes down what it is asked to do."""

    def __init__(self, name, log, fails_at=None, error=None):
        super().__init__(Candidate(name, "stock"))
        self.log, self.fails_at, self.error, self.fed = log, fails_at, error, []

    def prefill(self, ids, repeats=1):
        self.log.append((self.candidate.name, "prefill", tuple(ids.shape), repeats))
        return Prefill(1.0, ids.numel())

    def decode(self, ids):
        self.fed.append(ids)
        self.log.append((self.candidate.name, "decode"))
        if len(self.fed) == self.fails_at:
            raise self.error
        return float(len(self.fed))

    def held(self):
        return Held(1, 1, 1.0)

    def close(self):
        self.log.append((self.candidate.name, "close"))


def compete(*fakes, batch=2, distinct=2, context=200):
    made = Configuration(batch, context, torch.float32, (), distinct)
    result = Result(made, STEPS, [Measurement(fake.candidate.name, "stock", "") for fake in fakes])
    ids = torch.arange(batch * (context + a_plan().new_tokens)).view(batch, -1)
    measure(
        list(zip(fakes, result.measurements, strict=True)), result, ids, a_plan(), torch.device("cpu"), lambda _: None
    )
    return result, ids


def test_rounds_alternate_and_the_warm_up_does_not_count():
    log = []
    fakes = [Fake(name, log) for name in "abc"]
    result, ids = compete(*fakes)
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
    _, ids = compete(fake, batch=4, distinct=2)
    assert fake.log[1][1:] == ("decode",)
    assert fake.log[2] == ("a", "prefill", (2, 200), 2)
    assert torch.equal(fake.fed[1], ids[[0, 0, 1, 1], 200 : 200 + STEPS])


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "out of memory"),
        (PeerError("it is gone"), "it is gone"),
    ],
)
def test_who_cannot_go_on_is_left_out_and_the_others_go_on(error, says):
    log = []
    result, _ = compete(Fake("a", log), Fake("b", log, fails_at=3, error=error))
    first, second = result.measurements
    assert (first.failure, first.round_seconds) == (None, [3.0, 4.0])
    assert (second.failure, second.round_seconds) == (says, [])
    assert [entry for entry in log if entry[0] == "b"][-2:] == [("b", "decode"), ("b", "close")]
    assert result.ratios(second) == []


def test_another_error_is_not_hidden():
    with pytest.raises(RuntimeError, match="a bug"):
        compete(Fake("a", [], fails_at=2, error=RuntimeError("a bug")))


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
    local = Local(candidates.kept("h2o", 0.5, 40), tiny.llama(), None, a_plan())
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
    local = Local(candidates.kept(policy, keep, context), tiny.llama(layers=1), None, a_plan())
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
    assert shapes.find_shape(name).parameters == parameters


def test_random_model_has_the_shape_and_the_dtype():
    model = stock.random_model(TINY, torch.bfloat16, torch.device("cpu"))
    assert sum(parameter.numel() for parameter in model.parameters()) == TINY.parameters
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert row_bytes(model.config, torch.bfloat16) == TINY.row_bytes(torch.bfloat16)
    assert not model.training


def test_available_memory_is_asked_of_the_system():
    assert 2**20 < shapes.available_bytes(torch.device("cpu")) < 2**50


# Expectations.


def measured(name="keep 50%", kind="headwise", rounds=(1.0,), **more):
    return Measurement(name, kind, "", round_seconds=list(rounds), **more)


def result_of(batch, context, *measurements, dtype=torch.float32, ceiling=None, distinct=None):
    return Result(Configuration(batch, context, dtype, (), distinct or batch), 1, list(measurements), ceiling)


def rival(rounds=(2.0,), **more):
    return measured("stock", "stock", rounds, **more)


def judge_one(measure_of, record, bound=2.0, at_least=True):
    return Expectation("it", bound, at_least, "x", measure_of).judge(record)


SPEEDUP = expectations.speedup(8, 4096, torch.float32, "keep 50%")


@pytest.mark.parametrize(
    ("ours", "verdict"), [(1.0, MET), (0.9, MET), (1.0001, MISSED)], ids=["exactly", "more", "a hair less"]
)
def test_speed_is_judged_at_the_boundary(ours, verdict):
    found = judge_one(SPEEDUP, Record(results=[result_of(8, 4096, rival(), measured(rounds=[ours]))]))
    assert (found.verdict, found.measured) == (verdict, 2.0 / ours)
    assert found.target == ">= 2.00x"


def test_speed_is_the_median_of_the_ratios_of_rounds():
    record = Record(results=[result_of(8, 4096, rival([2.0, 4.0, 9.0]), measured(rounds=[1.0, 1.0, 9.0]))])
    assert judge_one(SPEEDUP, record).measured == 2.0


@pytest.mark.parametrize(
    "results",
    [
        [],
        [result_of(1, 4096, rival(), measured())],
        [result_of(8, 512, rival(), measured())],
        [result_of(8, 4096, rival(), measured("keep 25%"))],
        [result_of(8, 4096, rival(), measured(), dtype=torch.bfloat16)],
        [result_of(8, 4096, rival(), measured(failure="out of memory"))],
        [result_of(8, 4096, rival(), measured(rounds=()))],
        [result_of(8, 4096, rival(()), measured())],
    ],
    ids=["nothing", "batch", "context", "candidate", "dtype", "failed", "broken off", "no stock"],
)
def test_what_was_not_run_is_not_judged(results):
    found = judge_one(SPEEDUP, Record(results=results))
    assert (found.verdict, found.measured) == (NOT_RUN, None)


def test_running_where_stock_does_not_fit_is_as_good_as_any_speed():
    outlives = expectations.outlives_full(32, 16384, torch.float32, "keep 50%")
    fails = Record(results=[result_of(32, 16384, rival((), failure="out of memory"), measured())])
    found = judge_one(outlives, fails, bound=4.0)
    assert (found.verdict, found.measured, found.shown) == (MET, BOUNDLESS, "stock's cache does not fit")
    runs = Record(results=[result_of(32, 16384, rival(), measured())])
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
    theirs = rival(prefill=Prefill(1.0, 1, peak_bytes=450), after_prompt=Held(400, 400, 1.0))
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


def test_targets_run_everything_that_is_expected():
    everything = {"prefill": Prefill(1.0, 1, 0.1, 0.1, 9), "after_prompt": Held(9, 9, 1.0), "kernel_speed": kernel(1.0)}
    profile = ProfileCost(2048, "float32", [1.0], [1.0], [1.0])
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        results = []
        for made in plan.targets(device, dtype, "h2o"):
            ran = [measured(c.name, c.kind, **everything) for c in made.candidates]
            results.append(Result(made, 1, ran, Ceiling(1.0, "sum")))
        verdicts = expectations.judge(Record(results=results, profile=profile), device)
        assert verdicts
        assert not [verdict for verdict in verdicts if verdict.verdict == NOT_RUN]
    with pytest.raises(ConfigurationError, match="no targets"):
        plan.targets("mps", torch.float32, "h2o")


def test_targets_are_what_targets_runs(planned):
    assert "one --dtype" in call("--targets", "--dtype", "float32,bfloat16").err
    answer = call("--targets", "--shape", "smollm2-135m", "--json")
    assert answer.code == 0, answer.err
    assert [(c.batch, c.context) for c in planned[0].configurations] == [(1, 512), (1, 4096), (8, 4096)]
    assert {verdict["verdict"] for verdict in answer.json["expectations"]} == {NOT_RUN}


# The picture.


def drawn(record, path):
    save_picture(record, path)
    return matplotlib.image.imread(path)


def test_picture_is_a_png_with_something_on_it(told, picture):
    assert told.err.endswith(f"picture: {picture}\n")
    assert picture.read_bytes().startswith(b"\x89PNG")
    image = matplotlib.image.imread(picture)
    assert len({tuple(pixel) for pixel in image.reshape(-1, image.shape[2])[::7].round(1).tolist()}) > 5
    assert list(picture.parent.iterdir()) == [picture]


def test_picture_has_a_row_for_every_batch_and_leaves_out_what_was_not_measured(tmp_path):
    one = result_of(1, 64, rival(), measured(after_prompt=Held(5, 5, 0.5)), measured("late", rounds=()))
    several = [one, result_of(8, 64, rival(), measured()), result_of(8, 32, rival())]
    assert (
        drawn(Record(results=several), tmp_path / "b").shape[0] > drawn(Record(results=[one]), tmp_path / "a").shape[0]
    )


def test_there_is_no_picture_of_nothing(tmp_path):
    with pytest.raises(CacheStateError, match="nothing to draw"):
        save_picture(Record(results=[result_of(1, 64, rival(()))]), tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


# Peers.


FAKE = """
    import json, sys
    assert sys.argv[1].endswith("kvpress_peer.py")
    for line in sys.stdin:
        ask = json.loads(line)
        print(json.dumps(ask), file=open(sys.argv[0] + ".log", "a"))
        held = {"used_bytes": 100, "allocated_bytes": 128, "kept_ratio": 0.25}
        answers = {
            "load": {"kvpress": "9.9"},
            "prefill": {"seconds": 2.0, **held},
            "decode": {"seconds": 0.5, **held},
            "drop": {},
        }
        print(json.dumps(answers[ask["do"]] if %r != ask["do"] else %r), flush=True)
        if ask["do"] == "decode" and %r == "die":
            sys.exit("so long")
"""


@pytest.fixture
def fake_python(tmp_path):
    def make(fails_at="", failure=None, then=""):
        path = tmp_path / "python"
        path.write_text(f"#!{sys.executable}\n" + textwrap.dedent(FAKE % (fails_at, failure, then)))
        path.chmod(0o755)
        return path

    return make


def asked(python):
    return [json.loads(line) for line in python.with_name("python.log").read_text().splitlines()]


def test_peer_takes_its_turn_with_the_same_tokens(fake_python):
    python = fake_python()
    found = call(*small("--kvpress", python, "--kvpress-press", "SomePress", "--json")).json
    candidate = found["results"][0]["candidates"][-1]
    assert candidate["name"] == "kvpress 50%"
    assert candidate["round_seconds"] == [0.5] * ROUNDS
    assert candidate["prefill"]["seconds"] == 2.0
    assert candidate["after_prompt"] == {"used_bytes": 100, "allocated_bytes": 128, "kept_ratio": 0.25}
    assert found["versions"]["peer: kvpress"] == "9.9"
    requests = asked(python)
    assert [request["do"] for request in requests] == ["load", "prefill", "decode", "prefill", *["decode"] * 3, "drop"]
    load, _, _, prefill, *rest = requests
    assert load["config"]["num_hidden_layers"] == TINY.layers
    assert (load["dtype"], load["device"], load["threads"]) == ("float32", "cpu", torch.get_num_threads())
    assert (prefill["press"], prefill["keep"]) == ("SomePress", 0.5)
    fed = torch.cat([torch.tensor(request["ids"]) for request in [prefill, *rest[:-1]]], dim=1)
    assert torch.equal(fed, workload.random_ids(TINY.vocabulary, 1, 24 + STEPS * (ROUNDS + 2))[:, : fed.shape[1]])


def test_peer_gets_the_folder_of_a_model(fake_python, folder):
    python = fake_python()
    model = LlamaForCausalLM.from_pretrained(folder)
    peer = Peer(str(python))
    assert run._load(peer, run.Subject(model, tiny.tokenizer()), Record(), lambda _: None) is None
    peer.close()
    assert asked(python)[0]["folder"] == str(folder)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("prefill", {"error": "AssertionError: too short"}), "AssertionError: too short"),
        (("prefill", {"error": "no", "out_of_memory": True}), "out of memory"),
        (("prefill", "hello"), "an answer that is none: 'hello'"),
        (("", None, "die"), "ended: so long"),
    ],
    ids=["cannot read", "too large", "talks nonsense", "dies"],
)
def test_peer_that_fails_is_left_out(fake_python, options, says):
    peer = Peer(str(fake_python(*options)))
    result, _ = compete(Fake("stock", []), Remote(candidates.pressed("P", 0.5), peer))
    peer.close()
    assert says in result.measurements[1].failure
    assert result.measurements[0].round_seconds == [3.0, 4.0]


def test_peer_that_does_not_end_by_itself_is_ended(tmp_path):
    path = tmp_path / "python"
    path.write_text(f"#!{sys.executable}\nimport time\ntime.sleep(60)\n")
    path.chmod(0o755)
    peer = Peer(str(path))
    process = peer._process
    peer.close(patience=0.1)
    assert process.poll() is not None


class KeepHalf:
    """A press, as far as the worker needs one: hooks every attention layer and keeps the newest of the prompt."""

    def __init__(self, compression_ratio):
        self.share = 1 - compression_ratio

    @contextlib.contextmanager
    def __call__(self, model):
        def press(module, args, kwargs, output):
            layer = kwargs["past_key_values"].layers[module.layer_idx]
            rows = round(layer.keys.shape[2] * self.share)
            layer.keys, layer.values = layer.keys[:, :, -rows:].clone(), layer.values[:, :, -rows:].clone()

        layers = model.get_decoder().layers
        hooks = [layer.self_attn.register_forward_hook(press, with_kwargs=True) for layer in layers]
        yield
        for hook in hooks:
            hook.remove()


@pytest.fixture
def worker(monkeypatch):
    module = types.ModuleType("kvpress")
    module.KeepHalf = KeepHalf
    monkeypatch.setitem(sys.modules, "kvpress", module)
    version = kvpress_peer.metadata.version
    monkeypatch.setattr(kvpress_peer.metadata, "version", lambda name: "9.9" if name == "kvpress" else version(name))
    made = kvpress_peer.Worker()
    config = stock.llama_dimensions(TINY)
    asked = {"do": "load", "config": config, "dtype": "float32", "device": "cpu", "threads": torch.get_num_threads()}
    assert kvpress_peer.answer(made, asked)["kvpress"] == "9.9"
    return made


def test_worker_presses_the_prompt_and_goes_on_at_its_end(worker):
    ids = workload.random_ids(TINY.vocabulary, 2, 26)
    read = {"do": "prefill", "name": "a", "ids": ids[:, :20].tolist(), "repeats": 1, "press": "KeepHalf", "keep": 0.5}
    found = kvpress_peer.answer(worker, read)
    rows = 2 * TINY.layers * TINY.kv_heads
    assert (found["used_bytes"], found["allocated_bytes"], found["kept_ratio"]) == (
        rows * 10 * ROW,
        rows * 10 * ROW,
        0.5,
    )
    kvpress_peer.answer(worker, {**read, "name": "b", "keep": 1.0})
    for name in "ab":
        found = kvpress_peer.answer(worker, {"do": "decode", "name": name, "ids": ids[:, 20:].tolist()})
        assert found["seconds"] > 0
    assert found["kept_ratio"] == 1.0
    # What keeps everything decodes as stock does: every token at its own position.
    cache = DynamicCache()
    with torch.inference_mode():
        worker.model(input_ids=ids, past_key_values=cache)
    held, _ = worker.caches["b"]
    torch.testing.assert_close(held.layers[-1].keys, cache.layers[-1].keys)
    held, seen = worker.caches["a"]
    assert (seen, held.layers[0].keys.shape[2]) == (26, 16)
    torch.testing.assert_close(held.layers[0].keys, cache.layers[0].keys[:, :, 10:])
    assert kvpress_peer.answer(worker, {"do": "drop", "name": "a"}) == {}
    assert list(worker.caches) == ["b"]


def test_worker_repeats_sequences(worker):
    read = {"do": "prefill", "name": "a", "ids": [[1, 2, 3, 4]], "repeats": 3, "press": "KeepHalf", "keep": 0.5}
    kvpress_peer.answer(worker, read)
    assert worker.caches["a"][0].layers[0].keys.shape[0] == 3
    assert kvpress_peer.answer(worker, {"do": "decode", "name": "a", "ids": [[1], [1], [1]]})["seconds"] > 0


def test_worker_says_what_went_wrong(worker):
    found = kvpress_peer.answer(worker, {"do": "prefill", "ids": [[1]], "press": "NoPress", "keep": 0.5})
    assert found["error"].startswith("AttributeError: ")
    assert not found["out_of_memory"]


# Bad input.


BAD = {
    "no batch": (("--batch", "0"), "--batch must be a count of 1 or more"),
    "a batch twice": (("--batch", "2,2"), "--batch 2 is given twice"),
    "a batch that is none": (("--batch", "two"), "--batch takes numbers"),
    "no context": (("--context", "0"), "--context must be a count"),
    "a context twice": (("--context", "32,32"), "given twice"),
    "an empty context": (("--context", ""), "--context takes numbers"),
    "a context too long": (("--context", "64,600"), "512 positions; the longest context is 496"),
    "nothing kept": (("--keep", "0"), "--keep must be more than 0"),
    "more than all": (("--keep", "1.5"), "at most 1"),
    "not a number": (("--keep", "nan"), "more than 0"),
    "a share twice": (("--keep", "0.5,0.5"), "'keep 50%' is given twice"),
    "no steps": (("--steps", "0"), "--steps"),
    "no rounds": (("--rounds", "0"), "--rounds"),
    "too many rounds": (("--rounds", "160"), "do not fit"),
    "unknown dtype": (("--dtype", "float8"), "unknown dtype"),
    "a dtype twice": (("--dtype", "auto,float32"), "--dtype float32 is given twice"),
    "unknown device": (("--device", "tpux"), "unknown device"),
    "unknown policy": (("--policy", "h2"), "h2o, streamingllm, window, random"),
    "a policy that decides itself": (("--policy", "fastgen"), "keeps a given share"),
    "unknown kernel": (("--kernel", "fast"), "unknown kernel"),
    "unknown quantized cache": (("--quantized", "int3"), "unknown quantized cache"),
    "no eviction": (("--evict-every", "0"), "--evict-every"),
    "FastGen without a tokenizer": (("--recovery", "0.9"), "needs a tokenizer"),
    "a batch that cannot be repeated": (("--batch", "3", "--distinct", "2"), "does not divide 3"),
    "a peer that is not there": (("--kvpress", "no/such/python"), "cannot start"),
    "model and shape": (("--model", "here"), "not both"),
    "unknown shape": (("--shape", "llama-9b"), "unknown shape"),
    "targets and more": (("--targets",), "leave out --context, --keep"),
    "a picture nowhere": (("--png", "no/where.png"), "there is no folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_takes_one_line(case):
    arguments, says = BAD[case]
    answer = call(*small(*arguments))
    assert (answer.code, answer.out) == (2, "")
    complaint = answer.err.splitlines()[-1]
    assert complaint.startswith("error: ")
    assert says in complaint


def test_what_cannot_fit_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr(run, "available_bytes", lambda device: 2**33)
    monkeypatch.setattr("headwise.bench.stock.random_model", lambda *_: pytest.fail("made"))
    answer = call("--shape", "llama-7b")
    assert answer.code == 2
    assert "of memory and cpu has 8.00 GiB available" in answer.err


def test_caches_that_cannot_fit_are_refused_on_a_cpu_and_tried_on_a_gpu(monkeypatch):
    monkeypatch.setattr(run, "available_bytes", lambda device: 2**31)
    field = (candidates.stock(), candidates.kept("h2o", 0.5, 4096))
    made = a_plan(Configuration(8, 4096, torch.float32, field, 8))
    row_bytes = shapes.find_shape("smollm2-135m").row_bytes
    assert made.cache_bytes(row_bytes) == 1.5 * 8 * (4096 + STEPS * (ROUNDS + 2)) * row_bytes(torch.float32)
    with pytest.raises(InputError, match="fewer candidates"):
        run.check_memory(made, torch.device("cpu"), row_bytes)
    run.check_memory(made, torch.device("cuda"), row_bytes)


def test_a_round_that_holds_part_of_an_eviction_is_noted(planned):
    said = "do not hold the same number of evictions"
    assert said in call(*small("--steps", 6)).out
    assert said not in call(*small("--steps", 8)).out


def test_remote_closes_only_its_cache(fake_python):
    python = fake_python()
    peer = Peer(str(python))
    Remote(candidates.pressed("P", 0.5), peer).close()
    assert peer.load({"folder": "here"}, torch.bfloat16, torch.device("cpu")) == {"kvpress": "9.9"}
    peer.close()
    assert [request["do"] for request in asked(python)] == ["drop", "load"]
    with pytest.raises(PeerError):
        peer.ask("load")


def test_peer_that_is_broken_off_is_not_waited_for(tmp_path, monkeypatch):
    path = tmp_path / "python"
    path.write_text(f"#!{sys.executable}\nimport time\ntime.sleep(60)\n")
    path.chmod(0o755)
    peer = Peer(str(path))
    silent = types.SimpleNamespace(readline=interrupt, close=peer._process.stdout.close)
    monkeypatch.setattr(peer._process, "stdout", silent)
    with pytest.raises(KeyboardInterrupt):
        peer.ask("decode")
    # Neither asked for more nor given time to end.
    done, kill, wait = [], peer._process.kill, peer._process.wait
    monkeypatch.setattr(peer._process, "kill", lambda: (done.append("kill"), kill()))
    monkeypatch.setattr(peer._process, "wait", lambda **_: (done.append("wait"), wait(timeout=20)))
    Remote(candidates.pressed("P", 0.5), peer).close()
    peer.close()
    assert done == ["kill", "wait"]
    assert peer._process.returncode == -9


def interrupt():
    raise KeyboardInterrupt
