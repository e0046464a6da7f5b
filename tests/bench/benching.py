"""The bench as the tests call it, its smallest run, and results and contenders made by hand."""

from __future__ import annotations

import torch

from commands import call
from headwise.bench.contender_run import ContenderRun
from headwise.bench.contenders import Contender
from headwise.bench.plan import Configuration, Plan
from headwise.bench.record import Held, Measurement, Prefill, Result
from headwise.bench.rounds import run_rounds
from headwise.measure.model_info import SHAPES

TINY = SHAPES["tiny"]
STEPS, ROUNDS = 4, 2
ROW = 2 * TINY.head_dim * 4  # key and value in fp32


def bench(*arguments):
    return call("bench", *arguments)


def small(*more):
    rounds = ("--steps", STEPS, "--rounds", ROUNDS, "--evict-every", STEPS)
    return ("--shape", "tiny", "--context", 24, "--keep", 0.5, *rounds, *more)


def a_plan(*configurations):
    return Plan(configurations, STEPS, ROUNDS, kernel="auto", evict_every=STEPS)


def measured(name="keep 50%", kind="headwise", rounds=(1.0,), **more):
    return Measurement(name, kind, "", round_seconds=list(rounds), **more)


def result_of(batch, context, *measurements, dtype=torch.float32, ceiling=None, distinct=None):
    return Result(Configuration(batch, context, dtype, (), distinct or batch), 1, list(measurements), ceiling)


def stock_measured(rounds=(2.0,), **more):
    return measured("stock", "stock", rounds, **more)


class Fake(ContenderRun):
    """Writes down what it is asked to do."""

    def __init__(self, name, log, fails_at=None, error=None):
        super().__init__(Contender(name, "stock"))
        self.log, self.fails_at, self.error, self.fed = log, fails_at, error, []

    def prefill(self, ids, repeats=1):
        self.log.append((self.contender.name, "prefill", tuple(ids.shape), repeats))
        return Prefill(1.0, ids.numel())

    def decode(self, ids):
        self.fed.append(ids)
        self.log.append((self.contender.name, "decode"))
        if len(self.fed) == self.fails_at:
            raise self.error
        return float(len(self.fed))

    def held(self):
        return Held(1, 1, 1.0)

    def close(self):
        self.log.append((self.contender.name, "close"))


def run_by_hand(*fakes, batch=2, distinct=2, context=200):
    made = Configuration(batch, context, torch.float32, (), distinct)
    result = Result(made, STEPS, [Measurement(fake.contender.name, "stock", "") for fake in fakes])
    ids = torch.arange(batch * (context + a_plan().new_tokens)).view(batch, -1)
    run_rounds(
        list(zip(fakes, result.measurements, strict=True)), result, ids, a_plan(), torch.device("cpu"), lambda _: None
    )
    return result, ids
