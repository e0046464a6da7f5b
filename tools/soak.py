"""Soak: minutes and a seed -> random conversations with everything that may happen to a cache, and what differed.

    OMP_NUM_THREADS=1 python tools/soak.py --minutes 20 --seed 0

Small models of four families, eleven policies; batches, padding, turns, crops, selections, files, copies, errors thrown
into layers, `KeyboardInterrupt` at any moment. One conversation in five is played again plainly, with transformers'
own cache where nothing is evicted and with a fresh cache otherwise, and every token and logit compared. Before that,
one model in several threads. Prints JSON; the exit status is 1 where something differs or memory changes by over 1 %.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import time
import traceback
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import torch
from soaking.conversations import Conversation, Differs, Happenings, Kept, compare, draw, play
from soaking.memory import resident_bytes
from soaking.small_models import small_models
from transformers import DynamicCache, PreTrainedModel

import headwise

CHECKED = 5


def threads(models: list[PreTrainedModel], count: int, turns: int, dice: random.Random) -> int:
    """Conversations of that many turns in as many threads, each checked against the same alone; returns turns."""
    talks, taken = [[] for _ in range(count)], [0] * count
    for thread in range(count):
        while taken[thread] < turns:
            talk = draw(models[:1], dice)
            talks[thread].append(talk)
            taken[thread] += sum(step.kind == "turn" for step in talk.steps)
    alone = [[play(talk, talk.cache()) for talk in mine] for mine in talks]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(count) as pool:
            found = list(pool.map(lambda mine: [play(talk, talk.cache()) for talk in mine], talks))
    finally:
        sys.setswitchinterval(before)
    for mine, its in zip(found, alone, strict=True):
        for one, other in zip(mine, its, strict=True):
            if not all(torch.equal(a[0], b[0]) for a, b in zip(one, other, strict=True)):
                raise Differs("ids in a thread are not those alone")
    return sum(taken)


def plainly(talk: Conversation) -> Kept:
    """The same without anything beside it."""
    full = isinstance(talk.policy, headwise.Full)
    return play(talk, DynamicCache(config=talk.model.config) if full else talk.cache())


def soak(models: list[PreTrainedModel], seconds: float, dice: random.Random) -> dict[str, object]:
    """Conversations until the time is over."""
    happenings, counts, differing = Happenings(dice), Counter[str](), []
    began, first = time.monotonic(), None
    settled = min(60.0, seconds / 3)
    while time.monotonic() - began < seconds:
        talk, number = draw(models, dice), counts["conversations"]
        counts["conversations"] += 1
        counts["turns"] += sum(step.kind == "turn" for step in talk.steps)
        what = f"conversation {number}, {talk.model.config.model_type}, {talk.policy}"
        try:
            found = play(talk, talk.cache(), happenings)
            if number % CHECKED == 0:
                counts["tokens compared"] += compare(found, plainly(talk), what)
                counts["conversations compared"] += 1
        except Exception as error:
            differing.append(f"{what}: {type(error).__name__}: {error}")
            sys.stderr.write(f"{what}\n{traceback.format_exc()}\n")
        if first is None and time.monotonic() - began > settled:
            first = resident_bytes()
    last = resident_bytes()
    assert first is not None
    gc.collect()
    attached = [model.config.model_type for model in models if "forward" in vars(model)]
    return {
        **counts,
        "happened": dict(happenings.counts),
        "memory after the first minute": first,
        "memory at the end": last,
        "grown": round(last / first - 1, 4),
        "differing": differing + [f"something still hangs on {name}" for name in attached],
    }


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=8, help="threads that share a model; 0 for none")
    parser.add_argument("--turns", type=int, default=50, help="of each thread")
    return parser.parse_args()


def main() -> int:
    """Run it and print what came of it."""
    asked = options()
    warnings.filterwarnings("ignore", category=headwise.HeadwiseWarning)
    dice, models = random.Random(asked.seed), small_models(asked.seed)
    told: dict[str, object] = {"seed": asked.seed, "minutes": asked.minutes}
    if asked.threads:
        told["threads"], told["turns in threads"] = asked.threads, threads(models, asked.threads, asked.turns, dice)
    told |= soak(models, 60 * asked.minutes, dice)
    sys.stdout.write(json.dumps(told, indent=1) + "\n")
    return 1 if told["differing"] or abs(float(str(told["grown"]))) > 0.01 else 0


if __name__ == "__main__":
    sys.exit(main())
