"""Long run: a number of tokens and a policy -> memory and time per step of one cache that decodes them all.

    OMP_NUM_THREADS=1 python tools/long_run.py --tokens 100000 --policy auto:bytes=60000

A small model, a prompt of 64 tokens, then token by token. Prints JSON: the median and mean processor time of a step in
every tenth of the run, choices included, and what is held at its end; the exit status is 1 where a mean step of the
last tenth takes more than 10 % longer than in the second, or more is held by more than a twentieth.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

import torch
from soaking.memory import resident_bytes
from soaking.small_models import VOCABULARY, llama, tokenizer

import headwise
from headwise.policies.words import parse_policy
from headwise.units import storage_bytes

PARTS = 10


def decode(tokens: int, policy: str) -> list[dict[str, float]]:
    """What every tenth of the run took and held."""
    torch.manual_seed(0)
    model = llama(layers=2)
    cache = headwise.HeadwiseCache(model, parse_policy(policy), tokenizer=tokenizer())
    told = []
    with torch.no_grad():
        model(torch.arange(64)[None] % VOCABULARY, past_key_values=cache)
        ids = torch.tensor([[5]])
        for _ in range(PARTS):
            taken = []
            for _ in range(tokens // PARTS):
                began = time.thread_time()
                ids = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
                taken.append(time.thread_time() - began)
            told.append(
                {
                    "seen": cache.get_seq_length(),
                    "median": round(1000 * statistics.median(taken), 4),
                    "mean": round(1000 * statistics.fmean(taken), 4),
                    "held": storage_bytes(cache.tensors()),
                    "resident": resident_bytes(),
                }
            )
    return told


def main() -> int:
    """Run it and print what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--policy", default="streamingllm:window=124,sinks=4", help="words as of the command line")
    asked = parser.parse_args()
    told = decode(asked.tokens, asked.policy)
    # The first tenth warms up.
    early, late = told[1], told[-1]
    slower, grown = late["mean"] / early["mean"] - 1, late["resident"] / early["resident"] - 1
    more = late["held"] / early["held"] - 1
    found = {"slower": round(slower, 4), "grown": round(grown, 4), "more held": round(more, 4)}
    sys.stdout.write(
        json.dumps({"tokens": asked.tokens, "policy": asked.policy, **found, "tenths": told}, indent=1) + "\n"
    )
    return 1 if slower > 0.1 or grown > 0.01 or more > 0.05 else 0


if __name__ == "__main__":
    sys.exit(main())
