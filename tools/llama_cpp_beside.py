"""llama.cpp beside headwise: a context -> what a token costs with rows of 16, 8 and 4 bits, in either.

    pip install llama-cpp-python
    python tools/llama_cpp_beside.py --context 4096

The same model (llama.cpp: the GGUF file as it is, Q4_1 weights; headwise: the same weights in fp32), the same random
prompt. Their steps take turns, those with a context and those with a single token: the difference is what the cache
costs, and each one's quantized rows are held against its own 16-bit rows. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import headwise
from headwise.hosts.transformers.models import fetch_gguf
from headwise.policies import Full, Policy, Quantized

# Of llama.cpp's type_k and type_v (ggml.h), and of ours.
THEIRS = {"f16": 1, "q8_0": 8, "q4_0": 2}
OURS: dict[str, Policy] = {"float16": Full(), "int8": Quantized(Full(), 8), "int4": Quantized(Full(), 4)}


def llama_step(file: Path, kind: int, prompt: list[int], room: int) -> Callable[[int], object]:
    """A step of llama.cpp behind the prompt."""
    import llama_cpp

    threads = torch.get_num_threads()
    model = llama_cpp.Llama(
        str(file), n_ctx=room, n_threads=threads, flash_attn=True, type_k=kind, type_v=kind, verbose=False
    )
    model.eval(prompt)
    return lambda token: model.eval([token])


def our_step(model: Any, policy: Policy, prompt: list[int]) -> Callable[[int], object]:
    """A step of ours behind the prompt."""
    cache = headwise.HeadwiseCache(model, policy, cache_dtype=torch.float16)

    def step(*tokens: int) -> object:
        with torch.inference_mode():
            return model(input_ids=torch.tensor([tokens]), past_key_values=cache, logits_to_keep=1)

    step(*prompt)
    return step


def costs(seconds: dict[str, list[float]], names: list[str]) -> dict[str, dict[str, float]]:
    """Milliseconds of a step, of its cache, and of that against the first name's."""
    step = {name: 1000 * statistics.median(taken) for name, taken in seconds.items()}
    cache = {name: step[name] - step[f"{name}, one token"] for name in names}
    return {
        name: {
            "step ms": round(step[name], 2),
            "cache ms": round(cache[name], 2),
            "against 16 bits": round(cache[name] / cache[names[0]], 3),
        }
        for name in names
    }


def main() -> int:
    """Run it and print what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=24)
    asked = parser.parse_args()
    torch.manual_seed(0)
    model = headwise.load_default_model()[0]
    prompt = torch.randint(100, 40_000, (asked.context,)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        file, room = fetch_gguf(Path(folder)), asked.context + asked.steps + 8
        steps: dict[str, Callable[[int], object]] = {}
        for suffix, tokens in (("", prompt), (", one token", prompt[:1])):
            for name, kind in THEIRS.items():
                steps[name + suffix] = llama_step(file, kind, tokens, room)
            for name, policy in OURS.items():
                steps[name + suffix] = our_step(model, policy, tokens)
        taken: dict[str, list[float]] = {name: [] for name in steps}
        for token in prompt[: asked.steps]:
            for name, step in steps.items():
                began = time.perf_counter()
                step(token)
                taken[name].append(time.perf_counter() - began)
    found = {"llama.cpp": costs(taken, list(THEIRS)), "headwise": costs(taken, list(OURS))}
    sys.stdout.write(json.dumps({"context": asked.context, **found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
