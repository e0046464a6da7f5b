"""What a run of the bench says and writes: JSON, tables, quantized caches, a picture."""

from __future__ import annotations

import statistics
import types

import matplotlib.image
import pytest
import torch
from benching import ROUNDS, ROW, STEPS, TINY, a_plan, bench, measured, result_of, small, stock_measured
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from headwise import FastGen, HeadwiseCache
from headwise.bench import contenders, expectations, models, run, workload
from headwise.bench.contender_run import LocalRun
from headwise.bench.expectations import MET, MISSED, NOT_RUN
from headwise.bench.picture import save_picture
from headwise.bench.record import Held, Prefill, Record
from headwise.errors import CacheStateError, ConfigurationError
from headwise.measure import stock_caches

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
        "prefills",
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
    peak = next(verdict for verdict in found["expectations"] if verdict["name"].startswith("peak"))
    assert [verdict["verdict"] for verdict in found["expectations"] if verdict is not peak] == [NOT_RUN] * 13
    # Toy layers are smaller than what any pass needs for itself: either verdict is right that follows from the figure.
    assert peak["verdict"] == (MET if peak["measured"] <= 1.0 else MISSED)


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
                assert candidate["prefill_over_stock"] == pytest.approx(
                    prefill["seconds"] / rival["prefill"]["seconds"]
                )
                bound = candidate["after_prompt"]["used_bytes"] / result["ceiling"]["bytes_per_second"] * 1000
                assert candidate["bound_ms"] == pytest.approx(result["model_alone"]["step_ms"] + bound)
                assert candidate["bound_share"] == pytest.approx(candidate["bound_ms"] / candidate["step_ms"])
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
            model = LlamaForCausalLM(LlamaConfig(**models.llama_dimensions(TINY))).eval()
            policy = contenders.keeping("h2o", candidate["keep"], context).policy
            policy = contenders.full().policy if candidate["name"] == "full" else policy
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
    monkeypatch.setattr(stock_caches, "QuantizedCache", lambda *_: (_ for _ in ()).throw(ValueError("no such backend")))
    python = fake_python("load", {"error": "ModuleNotFoundError: No module named 'kvpress'"})
    answer = bench(*small("--quantized", "fp8", "--kvpress", python))
    assert answer.code == 0
    for word in ("stock", "full", "keep 50%", "x stock", "prefill", "memory gives", "not run", "written for"):
        assert word in answer.out
    for expectation in expectations.cpu():
        assert expectation.name in answer.out
    # Who could not run is a line, not a crash.
    assert "quantized fp8: no such backend" in answer.out
    assert "kvpress 50%: ModuleNotFoundError: No module named 'kvpress'" in answer.out
    assert "…" not in answer.out


def test_distinct_sequences_are_read_and_the_others_repeat_them():
    found = bench(*small("--batch", 4, "--distinct", 2, "--json")).json["results"][0]
    for candidate in found["candidates"]:
        assert candidate["prefill"]["tokens"] == 2 * 24
    rows = 4 * TINY.layers * TINY.kv_heads
    assert found["candidates"][0]["after_prompt"]["used_bytes"] == rows * 24 * ROW
    assert found["candidates"][1]["kernel_speed"]["bytes"] == rows * (24 + STEPS * (ROUNDS + 2)) * ROW


def test_a_model_with_a_tokenizer_reads_text(folder):
    arguments = ("--model", folder, "--context", 32, "--keep", 0.5, "--recovery", 0.9, "--steps", 2, "--rounds", 1)
    found = bench(*arguments, "--json").json
    names = [candidate["name"] for candidate in found["results"][0]["candidates"]]
    assert names == ["stock", "full", "keep 50%", "FastGen 0.9"]
    assert found["results"][0]["candidates"][-1]["setting"] == str(FastGen(0.9))


def test_interrupt_shows_what_there_is(monkeypatch):
    def broken_off(pairs, result, *rest):
        for _, measurement in pairs:
            measurement.round_seconds.append(1.0)
            measurement.prefill = Prefill(1.0, 10)
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run_rounds", broken_off)
    answer = bench(*small("--json"))
    assert answer.code == 130
    assert answer.err.endswith("interrupted\n")
    assert answer.json["interrupted"]
    assert [c["round_seconds"] for c in answer.json["results"][0]["candidates"]] == [[1.0]] * 3
    assert answer.json["results"][0]["candidates"][0]["after_prompt"] is None
    shown = bench(*small())
    assert shown.code == 130
    assert "4.0..4.0" in shown.out


# Quantized caches.


def test_a_quantized_cache_that_is_not_installed_is_named(monkeypatch, planned):
    monkeypatch.setattr(stock_caches, "_importable", lambda module: False)
    assert stock_caches.find_backend("auto") == (None, "not installed (pip install optimum-quanto)")
    assert stock_caches.find_backend("hqq") == (None, "not installed (pip install hqq)")
    assert stock_caches.find_backend("none") == (None, None)
    assert "quantized: not installed (pip install optimum-quanto)" in bench(*small()).out


def test_the_first_backend_that_is_installed_is_taken(monkeypatch):
    monkeypatch.setattr(stock_caches, "_importable", lambda module: module == "hqq")
    assert stock_caches.find_backend("auto") == ("hqq", None)


def test_bytes_of_a_quantized_cache_are_those_inside_its_tensors():
    model = models.random_model(TINY, torch.float32, torch.device("cpu"))
    try:
        cache = stock_caches.quantized_cache(model, "fp8")
    except ConfigurationError:
        pytest.skip("this release of transformers has no fp8 cache")
    local = LocalRun(contenders.quantized("fp8"), model, None, a_plan())
    local.prefill(workload.random_ids(TINY.vocabulary, 2, 20))
    numbers = 2 * TINY.layers * 2 * TINY.kv_heads * 20 * TINY.head_dim
    scales = 2 * TINY.layers * 4
    assert local.held() == Held(numbers + scales, numbers + scales, 1.0)
    assert stock_caches.tensors_of(cache) == []


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
    found = stock_caches.tensors_of(cache)
    assert [id(tensor) for tensor in found] == [id(inside), id(inside), id(scale)]


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
    one = result_of(1, 64, stock_measured(), measured(after_prompt=Held(5, 5, 0.5)), measured("late", rounds=()))
    several = [one, result_of(8, 64, stock_measured(), measured()), result_of(8, 32, stock_measured())]
    assert (
        drawn(Record(results=several), tmp_path / "b").shape[0] > drawn(Record(results=[one]), tmp_path / "a").shape[0]
    )


def test_there_is_no_picture_of_nothing(tmp_path):
    with pytest.raises(CacheStateError, match="nothing to draw"):
        save_picture(Record(results=[result_of(1, 64, stock_measured(()))]), tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []
