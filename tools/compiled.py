"""Compiled: a batch and a context -> steps under `torch.compile`, with transformers' static cache and with ours.

    python tools/compiled.py --batch 1 8 --context 2048

The default model (or `--layers 2`, random weights, for a try). Four contenders take turns: stock and static cache,
headwise with all rows and with half of them; each plain and, but for stock, with `torch.compile(model.forward)`. Prints
JSON: the median time of a step, and what the first ones took, in which it is compiled.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, StaticCache

import headwise
from headwise.bench.models import share_weights

WARM = 4


def contenders(model: Any, room: int) -> dict[str, Callable[[Any], Any]]:
    """Their caches, each for a model of its own."""
    half = headwise.H2O(heavy=0.25, recent=0.25)
    return {
        "dynamic": lambda own: DynamicCache(config=own.config),
        "static": lambda own: StaticCache(config=own.config, max_cache_len=room),
        "headwise full": lambda own: headwise.HeadwiseCache(own, headwise.Full()),
        "headwise half": lambda own: headwise.HeadwiseCache(own, half),
    }


def compare(model: Any, batch: int, context: int, steps: int, backend: str) -> dict[str, dict[str, float]]:
    """Median milliseconds of a step, by contender; their steps alternate."""
    ids = torch.randint(5, model.config.vocab_size - 5, (batch, context + WARM + steps))
    running, told = {}, {}
    for name, make in contenders(model, context + WARM + steps + 1).items():
        # A cache that grows is compiled anew at every step.
        for compiled in (False, True) if name != "dynamic" else (False,):
            own = share_weights(model)
            cache = make(own)
            with torch.inference_mode():
                own(input_ids=ids[:, :context], past_key_values=cache, logits_to_keep=1)
            if compiled:
                own.forward = torch.compile(own.forward, backend=backend)
            running[f"{name}, compiled" if compiled else name] = (own, cache)
    taken: dict[str, list[float]] = {name: [] for name in running}
    with torch.inference_mode():
        for at in range(context, ids.shape[1]):
            for name, (own, cache) in running.items():
                began = time.perf_counter()
                own(input_ids=ids[:, at : at + 1], past_key_values=cache)
                taken[name].append(time.perf_counter() - began)
    for name, seconds in taken.items():
        told[name] = {
            "step ms": round(1000 * statistics.median(seconds[WARM:]), 2),
            "first steps s": round(sum(seconds[:WARM]), 2),
        }
    return told


def main() -> int:
    """Run it and print what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--layers", type=int, help="of a small model with random weights, instead of the default one")
    asked = parser.parse_args()
    torch.manual_seed(0)
    # They share the model's code, and each is compiled for itself.
    torch._dynamo.config.recompile_limit = 64
    if asked.layers:
        from soaking.small_models import llama

        model = llama(layers=asked.layers)
    else:
        model = headwise.load_default_model()[0]
    found = {}
    for batch in asked.batch:
        found[f"batch {batch}"] = compare(model, batch, asked.context, asked.steps, asked.backend)
    sys.stdout.write(json.dumps({"context": asked.context, "torch": torch.__version__, **found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
