"""Slow steps: a policy, a batch and a context -> the usual step while writing, and those in which more happens.

    python tools/slow_steps.py --policy auto:ratio=0.125,gate=true --batch 8 --context 4096

The default model (or `--layers 2`, random weights, for a try) reads the Python manual and writes on, token by token.
Prints JSON: the median step; of the steps in which old rows become codes, and of those in which the policy chooses
again among what is held, how many there were and their medians; and the mean of all: what a long answer runs at.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

import torch

import headwise
from headwise.bench.workload import random_ids, text_ids
from headwise.policies.words import parse_policy


def decode(model: Any, tokenizer: Any, policy: headwise.Policy, batch: int, context: int, steps: int) -> dict[str, Any]:
    """What each kind of step takes, in milliseconds."""
    cache = headwise.HeadwiseCache(model, policy, tokenizer=tokenizer)
    ids = (
        random_ids(model.config.vocab_size, batch, context)
        if tokenizer is None
        else text_ids(tokenizer, batch, context)
    )
    kinds: dict[str, list[float]] = {"usual": [], "codes": [], "choice": []}
    with torch.no_grad():
        token = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
        cores = [layer.core for layer in cache.headwise_layers]
        for _ in range(steps):
            chosen, coded = cores[-1].evicted_at, cores[-1].store.not_encoded
            began = time.perf_counter()
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            took = 1000 * (time.perf_counter() - began)
            if cores[-1].evicted_at != chosen:
                kind = "choice"
            else:
                kind = "codes" if cores[-1].store.not_encoded < coded else "usual"
            kinds[kind].append(took)
    everything = [took for each in kinds.values() for took in each]
    medians = {
        kind: {"steps": len(each), "ms": round(statistics.median(each), 1)} for kind, each in kinds.items() if each
    }
    return {"mean ms": round(statistics.fmean(everything), 1), **medians}


def main() -> int:
    """Run it and print what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--policy", default="auto:ratio=0.125,gate=true", help="words as of the command line")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=2 * 56)
    parser.add_argument("--layers", type=int, help="a small model of so many instead")
    asked = parser.parse_args()
    if asked.layers is None:
        model, tokenizer = headwise.load_default_model()
    else:
        from soaking.small_models import llama

        model, tokenizer = llama(layers=asked.layers), None
    found = decode(model, tokenizer, parse_policy(asked.policy), asked.batch, asked.context, asked.steps)
    sys.stdout.write(
        json.dumps({"policy": asked.policy, "batch": asked.batch, "context": asked.context, **found}) + "\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
