"""vLLM worker: an engine and a load, a JSON object on standard input -> what the load took, one on standard output.

A process of its own, as an engine never gives back all that it takes. Whether headwise is active in it is said by the
environment (`VLLM_PLUGINS`).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

# The engine in this process: its scheduler is looked at. Threads as they were chosen outside.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

# Tokens between the beginnings of two prompts.
_APART = 611


def _run(llm: Any, ids: Sequence[int], load: dict[str, Any]) -> dict[str, Any]:
    """Requests that come at once, one step after the other until the last is answered."""
    from vllm import SamplingParams

    engine, count, tokens = llm.llm_engine, load["requests"], load["prompt"]
    scheduler = engine.engine_core.engine_core.scheduler
    params = SamplingParams(
        temperature=0, max_tokens=load["new"], ignore_eos=True, detokenize=False, extra_args=load["extra"]
    )
    for number in range(count):
        # Texts that have nothing in common at their beginning.
        at = number * _APART % (len(ids) - tokens)
        engine.add_request(str(number), {"prompt_token_ids": list(ids[at : at + tokens])}, params.clone())
    begun, first, last, steps = time.perf_counter(), dict[str, float](), dict[str, float](), []
    most, usage, put_off = 0, 0.0, set[tuple[str, int]]()
    while engine.has_unfinished_requests():
        before = time.perf_counter()
        outputs = engine.step()
        now = time.perf_counter()
        written = [each for each in outputs if each.outputs and each.outputs[0].token_ids]
        # A step in which every request writes a token, and no prompt is read.
        if len(written) == count and all(each.request_id in first for each in written):
            steps.append(now - before)
        for each in written:
            first.setdefault(each.request_id, now - begun)
            last[each.request_id] = now - begun
        most, usage = max(most, len(scheduler.running)), max(usage, scheduler.kv_cache_manager.usage)
        put_off |= {(each.request_id, each.num_preemptions) for each in scheduler.waiting if each.num_preemptions}
    seconds = time.perf_counter() - begun
    return {
        "seconds": seconds,
        "tokens_per_second": count * load["new"] / seconds,
        "at_once": most,
        "preemptions": len(put_off),
        "usage": usage,
        "first_token": sorted(first.values()),
        "per_token": sorted((last[each] - first[each]) / max(1, load["new"] - 1) for each in first),
        "steps": steps,
    }


def main() -> None:
    """Answer one request."""
    asked = json.load(sys.stdin)
    # What else writes to standard output is in the way of the answer.
    answer, sys.stdout = sys.stdout, sys.stderr
    from vllm import LLM

    llm = LLM(model=asked["model"], skip_tokenizer_init=True, enforce_eager=True, seed=0, **asked["engine"])
    json.dump(_run(llm, asked["ids"], asked["load"]), answer)
    answer.flush()


if __name__ == "__main__":
    main()
