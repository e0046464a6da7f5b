"""vLLM rounds: a model and loads -> the same engine with headwise and without, in turn, and what each load took."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from headwise.errors import HeadwiseError

STOCK, PLAIN, COMPRESSED = "stock", "plain", "compressed"


class EngineError(HeadwiseError):
    """An engine could not be started, or did not answer; the message has the last it said."""


@dataclass(frozen=True)
class Load:
    """Requests that come at once.

    Attributes:
        cache: memory for keys and values, in MiB.
        requests: how many; each has `prompt` tokens and writes `new`.
    """

    name: str
    cache: int
    requests: int
    prompt: int
    new: int


@dataclass(frozen=True)
class Asked:
    """What is measured.

    Attributes:
        model: a folder that vLLM can read.
        ids: tokens of a text, of which prompts are parts.
        keeps: what compressed requests say.
    """

    model: str
    ids: Sequence[int]
    keeps: dict[str, Any]
    dtype: str
    block_size: int
    loads: Sequence[Load]
    rounds: int


def run(asked: Asked, tell: Callable[[str], None]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Name of a load, how its requests were, and what they took; round after round, engines in turn.

    Every load has an engine of its own: one that was used has its blocks in another order.
    """
    kinds = (STOCK, COMPRESSED, PLAIN)
    for number in range(asked.rounds):
        for load in asked.loads:
            for at in range(len(kinds)):
                kind = kinds[(at + number) % len(kinds)]
                tell(f"round {number + 1} of {asked.rounds}: {load.name}, {kind}")
                yield load.name, kind, _ask(asked, load, kind)


def summary(found: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Medians over the rounds."""
    steps = [each for one in found for each in one["steps"]]
    return {
        **{name: median(each[name] for each in found) for name in ("seconds", "tokens_per_second", "usage")},
        **{name: float(max(each[name] for each in found)) for name in ("at_once", "preemptions")},
        **{name: median(median(each[name]) for each in found) for name in ("first_token", "per_token")},
        "step": median(steps) if steps else None,
    }


def _ask(asked: Asked, load: Load, kind: str) -> dict[str, Any]:
    longest = load.prompt + load.new
    engine = {
        "dtype": asked.dtype,
        "block_size": asked.block_size,
        "kv_cache_memory_bytes": load.cache * 2**20,
        "max_model_len": longest + asked.block_size,
        "max_num_seqs": max(8, load.requests),
        "max_num_batched_tokens": max(2048, longest),
    }
    said = {"headwise": asked.keeps} if kind == COMPRESSED else None
    asks = {"requests": load.requests, "prompt": load.prompt, "new": load.new, "extra": said}
    words = json.dumps({"model": asked.model, "ids": list(asked.ids), "engine": engine, "load": asks})
    environment = dict(os.environ)
    if kind == STOCK:
        environment["VLLM_PLUGINS"] = ""
    command = [sys.executable, "-m", "headwise.bench.vllm_worker"]
    done = subprocess.run(command, input=words, capture_output=True, text=True, env=environment, check=False)
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError as error:
        raise EngineError(f"vLLM did not answer: {done.stderr.strip()[-2000:]}") from error
    return answer
