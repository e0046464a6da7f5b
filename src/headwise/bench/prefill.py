"""Prefill: a model, a prompt and what is looked at in it -> seconds of reading it with each, beside stock, in turn."""

from __future__ import annotations

from collections.abc import Callable

from headwise.bench.contender_run import LocalRun, free_memory
from headwise.bench.contenders import HEADWISE, STOCK, Contender, stock
from headwise.bench.models import Model, Tokenizer
from headwise.bench.plan import Plan
from headwise.bench.record import EXACT, FASTGEN, GATES, LAST, REPETITION, PrefillCosts
from headwise.errors import HeadwiseError
from headwise.measure.turns import turns
from headwise.policies import Auto, ExpectedAttention, FastGen, Full, KeyDiff, Policy, SnapKV, StreamingLLM
from headwise.policies.h2o import H2O
from headwise.policies.words import in_bits
from headwise.types import Int, Tensor

# What each looks at, of policies that need no tokenizer and no trained weights.
_LADDER = "local", "local+frequent", "full"
_LOOKS: dict[str, Policy] = {
    EXACT: H2O(0.25, 0.25),
    "nothing": StreamingLLM(0.5, 4),
    LAST: SnapKV(0.5),
    "mass in bands": FastGen(0.95, ladder=_LADDER),
    "mass of a tenth of the rows": FastGen(0.95, ladder=_LADDER, profile_rows=0.1),
    "expected queries": ExpectedAttention(0.5),
    "keys": KeyDiff(0.5),
    "nothing, in 8 bits": in_bits(Full(), "int8"),
    "nothing, in 4 bits": in_bits(Full(), "int4"),
}

# The same of policies that need a tokenizer, or what was trained for the model.
_LOOKS_OF_A_MODEL: dict[str, Policy] = {
    EXACT: H2O(0.25, 0.25),
    FASTGEN: FastGen(0.95),
    LAST: SnapKV(0.25),
    GATES: Auto(ratio=0.25, gate=True),
    REPETITION: Auto(ratio=0.25),
}


def measure_prefills(
    costs: PrefillCosts,
    model: Model,
    tokenizer: Tokenizer | None,
    ids: Int[Tensor, "1 t"],
    plan: Plan,
    say: Callable[[str], None],
) -> None:
    """Let stock and every look read the prompt in turn, and note the seconds; the first turn does not count.

    Args:
        costs: what to fill.
        tokenizer: None for made-up weights, which have no trained gates either.
        plan: how many turns count, and what is used of headwise.
    """
    looks = _LOOKS if tokenizer is None else _LOOKS_OF_A_MODEL
    contenders = [stock(), *(Contender(look, HEADWISE, policy) for look, policy in looks.items())]
    runs = [LocalRun(contender, model, tokenizer, plan) for contender in contenders]
    for number in range(plan.rounds + 1):
        for run in turns(runs, number):
            name = run.contender.name
            if name in costs.failures:
                continue
            say(f"prompt of {costs.context:,} tokens, {name}, turn {number} of {plan.rounds}")
            try:
                seconds = run.prefill(ids).seconds
            except Exception as error:
                # What a model cannot be served with is a result: there may be no gates for it.
                if not (plan.keep_going or isinstance(error, HeadwiseError)):
                    raise
                costs.failures[name] = f"{type(error).__name__}: {error}"
                continue
            finally:
                # What it holds would be in the way of the next.
                run.drop()
                free_memory()
            if number:
                (costs.stock if name == STOCK else costs.looks.setdefault(name, [])).append(seconds)
    for run in runs:
        run.close()
