"""Bad input to the bench takes one line."""

from __future__ import annotations

import pytest
import torch
from benching import ROUNDS, STEPS, a_plan, bench, small

from headwise.bench import contenders, run
from headwise.bench.plan import Configuration
from headwise.errors import InputError
from headwise.measure.model_info import find_shape

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
    answer = bench(*small(*arguments))
    assert (answer.code, answer.out) == (2, "")
    complaint = answer.err.splitlines()[-1]
    assert complaint.startswith("error: ")
    assert says in complaint


def test_what_cannot_fit_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr(run, "available_bytes", lambda device: 2**33)
    monkeypatch.setattr("headwise.bench.models.random_model", lambda *_: pytest.fail("made"))
    answer = bench("--shape", "llama-7b")
    assert answer.code == 2
    assert "of memory and cpu has 8.00 GiB available" in answer.err


def test_caches_that_cannot_fit_are_refused_on_a_cpu_and_tried_on_a_gpu(monkeypatch):
    monkeypatch.setattr(run, "available_bytes", lambda device: 2**31)
    field = (contenders.stock(), contenders.keeping("h2o", 0.5, 4096))
    made = a_plan(Configuration(8, 4096, torch.float32, field, 8))
    row_bytes = find_shape("smollm2-135m").row_bytes
    assert made.cache_bytes(row_bytes) == 1.5 * 8 * (4096 + STEPS * (ROUNDS + 2)) * row_bytes(torch.float32)
    with pytest.raises(InputError, match="fewer candidates"):
        run.check_memory(made, torch.device("cpu"), row_bytes)
    run.check_memory(made, torch.device("cuda"), row_bytes)


def test_a_round_that_holds_part_of_an_eviction_is_noted(planned):
    said = "do not hold the same number of evictions"
    assert said in bench(*small("--steps", 6)).out
    assert said not in bench(*small("--steps", 8)).out
