"""vLLM's OpenAI server with headwise installed, asked by the openai package: one round trip of everything."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import psutil
import pytest
from servers import KEEPS, TEXT, Server


def test_completions_with_and_without(server):
    plain, compressed, whole = (
        server.complete(),
        server.complete(keeps=KEEPS),
        server.complete(keeps={**KEEPS, "headwise_ratio": 1}),
    )
    assert plain.usage.prompt_tokens > 300
    # The first comes of the pass that reads the prompt.
    first = [each.choices[0].logprobs.token_logprobs[0] for each in (plain, compressed, whole)]
    assert first == pytest.approx([first[0]] * 3, abs=1e-4)
    assert whole.choices[0].text == plain.choices[0].text != compressed.choices[0].text
    assert server.complete().choices[0].text == plain.choices[0].text


def test_streams_chats_and_many_at_once(server):
    whole = server.complete(keeps=KEEPS).choices[0].text
    assert "".join(part.choices[0].text for part in server.complete(keeps=KEEPS, stream=True)) == whole
    told = [{"role": "user", "content": TEXT}]
    answer = server.client.chat.completions.create(
        model="small", messages=told, max_tokens=4, extra_body={"vllm_xargs": KEEPS}
    )
    assert answer.usage.completion_tokens == 4
    with ThreadPoolExecutor(12) as many:
        ratios = [0.25, 0.5, None] * 8
        found = list(
            many.map(lambda ratio: server.complete(keeps=ratio and {**KEEPS, "headwise_ratio": ratio}), ratios)
        )
    texts = [{each.choices[0].text for each in found[start::3]} for start in range(3)]
    assert texts[0] == {whole} and all(len(each) == 1 for each in texts)


def test_policies_that_look_at_all_attention_and_at_kinds_of_tokens(server):
    plain = server.complete()
    for policy in ("fastgen", "h2o"):
        keeps = {"headwise_policy": policy, "headwise_ratio": 0.25}
        found, whole = (server.complete(keeps={**keeps, **more}) for more in ({}, {"headwise_ratio": 1}))
        assert whole.choices[0].text == plain.choices[0].text != found.choices[0].text


def test_metrics_stand_beside_those_of_vllm(server):
    server.complete(keeps=KEEPS)
    told = server.get("/metrics")
    assert "vllm:num_requests_running" in told
    for name in ("requests", "blocks_kept", "blocks_freed", "choosing_seconds"):
        start = f'headwise:{name}_total{{policy="adakv"}}'
        (line,) = [each for each in told.splitlines() if each.startswith(start)]
        assert float(line.split()[-1]) > 0
    assert "headwise:kept_ratio 0." in told


@pytest.mark.parametrize(
    ("keeps", "why"),
    [
        ({"headwise_policy": "snapkw"}, "did you mean snapkv"),
        ({"headwise_policy": "fastgen:recovery=0.9"}, "leave recovery out"),
        ({"headwise_policy": "kvzip:gate=true"}, "were trained for"),
        ({"headwise_ratio": 0}, "ratio must be above 0"),
        ({"headwise_ratios": 0.5}, "has no 'headwise_ratios'"),
        ({"headwise": "on"}, "is an object such as"),
    ],
)
def test_what_cannot_be_is_answered_with_400(server, keeps, why):
    with pytest.raises(openai.BadRequestError, match=why) as found:
        server.complete(keeps=keeps)
    assert found.value.status_code == 400
    assert server.complete(max_tokens=1).choices[0].text is not None


def test_a_default_for_all_and_a_worker_that_dies(served, tmp_path, server):
    """A request may change it, or do without; when a process is killed, the server says so."""
    whole, kept = (server.complete(keeps=keeps).choices[0].text for keeps in (None, KEEPS))
    default = json.dumps({"policy": KEEPS["headwise_policy"], "ratio": KEEPS["headwise_ratio"]})
    # As where several servers are asked for metrics.
    (tmp_path / "shared").mkdir()
    shared = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "shared")}
    other = Server(served, tmp_path / "log", HEADWISE_VLLM_DEFAULT=default, **shared)
    try:
        assert other.complete().choices[0].text == kept
        assert other.complete(keeps={"headwise": "off"}).choices[0].text == whole
        assert other.complete(keeps={"headwise_ratio": 1}).choices[0].text == whole
        told = other.get("/metrics")
        for name in ("requests", "blocks_kept", "blocks_freed", "choosing_seconds"):
            (line,) = [each for each in told.splitlines() if each.startswith(f"headwise:{name}_total{{")]
            assert 'policy="adakv"' in line and float(line.split()[-1]) > 0
        workers = [
            each for each in psutil.Process(other.process.pid).children(recursive=True) if "Worker" in each.name()
        ]
        assert workers
        with ThreadPoolExecutor(1) as one:
            asked = one.submit(lambda: other.complete(max_tokens=3000, logprobs=None))
            time.sleep(1)
            for worker in workers:
                worker.kill()
            with pytest.raises((openai.APIStatusError, openai.APIConnectionError)):
                asked.result(60)
    finally:
        other.stop()
