"""Requests in vLLM, compressed and not, token by token against transformers with the same rows masked."""

from __future__ import annotations

import json
import random

import engines
import pytest
from engines import Kept, check, free_blocks, params, prompt

POLICIES = (
    *("adakv:over=snapkv", "snapkv:window=16", "expected-attention", "keydiff", "tova", "streamingllm", "keynorm"),
    *("h2o", "fastgen:ladder=frequent,frequent+local,full", "kvzip:gate=true", "pyramidkv:window=16", "scissorhands"),
)


def run(llm, requests, arrive=lambda number: 0, cancel=frozenset()):
    """Outputs by number; a request is let in at the step that `arrive` says, and some are cancelled."""
    engine, found, step, waiting = llm.llm_engine, {}, 0, dict(enumerate(requests))
    while waiting or engine.has_unfinished_requests():
        for number in [each for each in waiting if arrive(each) <= step]:
            ids, given = waiting.pop(number)
            engine.add_request(str(number), {"prompt_token_ids": ids}, given)
        for output in engine.step():
            found[int(output.request_id)] = output.outputs[0]
        step += 1
        for number in cancel:
            if arrive(number) + 3 == step:
                engine.abort_request([str(number)])
    return found


def test_policies_ratios_and_plain_requests_that_come_over_time(llm, folder, monkeypatch):
    kept, rng = Kept(monkeypatch), random.Random(5)
    lengths = [*rng.sample(range(1, 700), 36), 1, 1023, 2048, 3000]
    requests, arrivals = [], [rng.randrange(60) for _ in lengths]
    for number, length in enumerate(lengths):
        policy = None if number % 6 == 5 else POLICIES[number % len(POLICIES)]
        given = params(policy, rng.choice([0.1, 0.25, 0.5, 0.9]), rng.randrange(1, 70))
        requests.append((prompt(length, number), given))
    cancel = {7, 11, 20}
    before = free_blocks(llm)
    found = run(llm, requests, arrivals.__getitem__, cancel)
    assert free_blocks(llm) == before
    for number, (ids, given) in enumerate(requests):
        if number not in cancel:
            own = kept.rows.get(len(ids)) if given.extra_args else None
            assert len(found[number].token_ids) == given.max_tokens
            check(folder, ids, found[number], own)
    assert kept.choices > 20 * engines.LAYERS


def test_blocks_go_while_the_request_runs_and_all_come_back(llm, monkeypatch):
    engine, before = llm.llm_engine, free_blocks(llm)
    engine.add_request("one", {"prompt_token_ids": prompt(1000, 1)}, params("snapkv", 0.25, 40))
    most, least = 0, before
    while engine.has_unfinished_requests():
        engine.step()
        held = before - free_blocks(llm)
        most, least = max(most, held), min(least, held) if held else least
    # 31 whole blocks and one that is not; 8 of the 31 stay.
    assert most == 32 and least == 8 + 1 and free_blocks(llm) == before


def test_requests_that_are_put_off_go_on_as_if_nothing_had_been(llm, folder, monkeypatch):
    """So little memory that some are read again, with what they wrote."""
    kept, pool, put_off = Kept(monkeypatch), engines.pool(llm), []
    policies = ("adakv:over=snapkv", "pyramidkv:window=16", "h2o", "kvzip:gate=true")
    requests = [(prompt(500 + 7 * i, i), params(policies[i % 4], 0.5, 200)) for i in range(8)]
    requests += [(prompt(300, 99), params(None, tokens=100))]
    scheduler = engines.scheduler(llm)
    preempt = scheduler._preempt_request

    def noted(*given, **named):
        put_off.append((given[0], given[0].num_output_tokens))
        preempt(*given, **named)

    monkeypatch.setattr(scheduler, "_preempt_request", noted)
    taken = pool.get_new_blocks(free_blocks(llm) - 45)
    found = run(llm, requests)
    assert free_blocks(llm) == 45
    policies_put_off = {
        request.sampling_params.extra_args["headwise"]["policy"]
        for request, written in put_off
        if request.sampling_params.extra_args is not None and written > 0
    }
    # Of layers that share what stays, and of layers that do not.
    assert policies_put_off & set(policies[::2]) and policies_put_off & set(policies[1::2])
    pool.free_blocks(taken)
    for number, (ids, given) in enumerate(requests):
        check(folder, ids, found[number], kept.rows.get(len(ids)) if given.extra_args else None)


def test_several_answers_of_one_prompt(llm, folder, monkeypatch):
    kept, ids = Kept(monkeypatch), prompt(333, 8)
    (output,) = llm.generate([{"prompt_token_ids": ids}], params("snapkv", 0.25, 8, n=3, temperature=1.0))
    assert len({tuple(each.token_ids) for each in output.outputs}) == 3
    for each in output.outputs:
        new = list(each.token_ids)
        found = [step[token].logprob for step, token in zip(each.logprobs, new, strict=True)]
        likely = engines.expected(folder, ids, new, kept.rows[333])
        assert found == pytest.approx([float(likely[i, token]) for i, token in enumerate(new)], abs=1e-4)


def test_what_a_prompt_is_likely_by_is_that_of_the_whole(llm):
    """Its log-probabilities come of the pass that reads it."""
    ids = prompt(200, 4)
    plain, compressed = (
        llm.generate([{"prompt_token_ids": ids}], params(policy, 0.25, 2, prompt_logprobs=0))[0]
        for policy in (None, "snapkv")
    )
    one, other = (
        [step[token].logprob for step, token in zip(each.prompt_logprobs[1:], ids[1:], strict=True)]
        for each in (plain, compressed)
    )
    assert other == pytest.approx(one, abs=1e-4)


def test_plain_requests_still_share_prefixes(llm):
    ids = prompt(640, 12)
    first = llm.generate([{"prompt_token_ids": ids}], params(None, tokens=4))[0]
    compressed = llm.generate([{"prompt_token_ids": ids}], params("snapkv", 0.25, tokens=4))[0]
    again = llm.generate([{"prompt_token_ids": ids}], params(None, tokens=4))[0]
    assert compressed.num_cached_tokens == 0 and again.num_cached_tokens == 640 - engines.BLOCK
    assert again.outputs[0].token_ids == first.outputs[0].token_ids


def test_what_is_counted(llm, tmp_path, monkeypatch):
    from prometheus_client import CollectorRegistry, generate_latest

    from headwise.hosts.vllm import metrics

    monkeypatch.setenv(metrics.FOLDER, str(tmp_path))
    metrics._COUNTED.clear()
    (tmp_path / "1.json").write_text(json.dumps([["blocks_freed", "tova", 7]]))
    (tmp_path / "2.json").write_text("{ half of a file")
    given = [params("tova", 0.25), params("snapkv", 0.5), params("snapkv:window=16", 0.5), params(None)]
    llm.generate([{"prompt_token_ids": prompt(40 * engines.BLOCK, seed)} for seed in range(4)], given)
    found = metrics.totals()
    seconds = {key: found.pop(key) for key in list(found) if key[0] == "choosing_seconds"}
    assert set(seconds) == {("choosing_seconds", "tova"), ("choosing_seconds", "snapkv")} and min(seconds.values()) > 0
    assert found == {
        ("requests", "tova"): 1,
        ("requests", "snapkv"): 2,
        ("blocks_kept", "tova"): 10,
        ("blocks_freed", "tova"): 30 + 7,
        ("blocks_kept", "snapkv"): 40,
        ("blocks_freed", "snapkv"): 40,
    }
    registry = CollectorRegistry()
    registry.register(metrics.Collector())
    told = generate_latest(registry).decode()
    assert 'headwise:blocks_freed_total{policy="tova"} 37.0' in told
    assert f"headwise:kept_ratio {50 / 127}" in told


def test_parameters_of_the_caller_stay_as_they_are(llm):
    given = params("snapkv", 0.25, 2)
    before = given.clone()
    llm.generate([{"prompt_token_ids": prompt(100, 1)}], given)
    assert given.skip_reading_prefix_cache == before.skip_reading_prefix_cache and given.extra_args == before.extra_args


def test_what_a_cancelled_prompt_asked_is_not_kept_for_good(llm, monkeypatch):
    """It was cancelled while its prompt was read, of which all queries were held."""
    from headwise.hosts.vllm import step

    monkeypatch.setattr(step, "_PATIENCE", 3)
    made, make = [], step.Prompt.__init__
    monkeypatch.setattr(
        step.Prompt, "__init__", lambda own, *given, **named: (make(own, *given, **named), made.append(own))[0]
    )
    engine = llm.llm_engine
    engine.add_request("gone", {"prompt_token_ids": prompt(2000, 3)}, params("expected-attention", 0.25, 2))
    engine.step()
    engine.abort_request(["gone"])
    assert len(made) == 1 and made[0].asked
    engine.add_request("plain", {"prompt_token_ids": prompt(40, 4)}, params(None, tokens=6))
    while engine.has_unfinished_requests():
        engine.step()
    llm.generate([{"prompt_token_ids": prompt(640, 5)}], params("snapkv", 0.25, 2))
    assert len(made) == 2 and not made[0].asked
