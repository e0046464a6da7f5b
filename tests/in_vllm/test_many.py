"""Many requests at random in vLLM: every one is answered, and every block comes back."""

from __future__ import annotations

import random

from engines import free_blocks, params, pool, prompt

POLICIES = (None, "adakv:over=snapkv", "snapkv:window=8", "expected-attention", "keydiff", "tova", "streamingllm")


def test_five_hundred_requests_leave_nothing(llm):
    """Some are cancelled, some put off: there is room for few."""
    rng, engine, before = random.Random(11), llm.llm_engine, free_blocks(llm)
    taken = pool(llm).get_new_blocks(before - 50)
    waiting, asked, done, cancelled = list(range(500)), {}, {}, set()
    while waiting or engine.has_unfinished_requests():
        for _ in range(min(len(waiting), rng.randrange(12))):
            number = waiting.pop()
            length = rng.choice([1, 31, 32, 33, 64, rng.randrange(2, 400)])
            given = params(rng.choice(POLICIES), rng.choice([0.1, 0.3, 0.6, 1]), rng.randrange(1, 40))
            asked[str(number)] = given.max_tokens
            engine.add_request(str(number), {"prompt_token_ids": prompt(length, number)}, given)
        for output in engine.step():
            if output.finished:
                done[output.request_id] = len(output.outputs[0].token_ids)
        running = [each for each in asked if each not in done and each not in cancelled]
        if running and rng.random() < 0.1:
            cancelled.add(rng.choice(running))
            engine.abort_request(list(cancelled))
    assert len(cancelled) > 10 and free_blocks(llm) == 50
    pool(llm).free_blocks(taken)
    assert free_blocks(llm) == before
    assert set(done) | cancelled == set(asked)
    assert all(done[each] == asked[each] for each in done if each not in cancelled)
