"""Rounds: contenders at work and token ids -> a result, filled in turn by turn: an interruption loses nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from headwise.bench.bandwidth import Ceiling, measure_ceiling
from headwise.bench.contender_run import ContenderRun, free_memory
from headwise.bench.kvpress_process import KvpressError
from headwise.bench.plan import Plan
from headwise.bench.record import OUT_OF_MEMORY, Measurement, Result
from headwise.errors import HeadwiseError
from headwise.measure.turns import turns
from headwise.types import Int, Tensor

# Tokens of prompt and of decoding that wake everything up: compilers, thread pools, libraries.
_WARM_PROMPT = 128
_WARM_STEPS = 2


def run_rounds(
    pairs: Sequence[tuple[ContenderRun, Measurement]],
    result: Result,
    ids: Int[Tensor, "b t"],
    plan: Plan,
    device: torch.device,
    say: Callable[[str], None],
) -> None:
    """Let the contenders read the prompt one after the other, decode in turn, and measure what they hold.

    Args:
        pairs: who takes part, and where to write down how it went; stock is the first.
        ids: the prompt and all tokens that are decoded.
        device: whose bandwidth is measured.
        say: takes a word on how far it is.
    """
    configuration = result.configuration
    context, repeats = configuration.context, configuration.batch // configuration.distinct
    prompt = ids[: configuration.distinct, :context]
    # The batch as it stands when some of its sequences are repeated.
    ids = ids[: configuration.distinct].repeat_interleave(repeats, dim=0)

    def warm_up(contender: ContenderRun, _: Measurement) -> None:
        contender.prefill(prompt[:, :_WARM_PROMPT])
        contender.decode(prompt[:, :_WARM_STEPS])

    def prefill(contender: ContenderRun, measurement: Measurement) -> None:
        say(f"{configuration.title}: {measurement.name} reads the prompt")
        measurement.prefill = contender.prefill(prompt[:, :1] if contender.contender.alone else prompt, repeats)
        measurement.kernel = contender.kernel
        measurement.after_prompt = contender.held()

    def measure_attention(contender: ContenderRun, measurement: Measurement) -> None:
        measurement.attention_share = contender.attention_share(ids[:, plan.round_ids(plan.rounds + 1, context)])

    def measure_held(contender: ContenderRun, measurement: Measurement) -> None:
        measurement.after_decode = contender.held()
        measurement.kernel_speed = contender.kernel_speed()

    guarded = partial(_guarded, keep_going=plan.keep_going)
    for action in (warm_up, prefill):
        for pair in pairs:
            guarded(action, *pair)
    for number in range(plan.rounds + 1):
        say(f"{configuration.title}: " + (f"round {number} of {plan.rounds}" if number else "warm-up round"))
        for contender, measurement in turns(pairs, number):

            def decode(contender: ContenderRun, measurement: Measurement, number: int = number) -> None:
                seconds = contender.decode(ids[:, plan.round_ids(number, context)])
                if number:
                    measurement.round_seconds.append(seconds)

            guarded(decode, contender, measurement)
    for pair in pairs:
        guarded(measure_attention, *pair)
    say(f"{configuration.title}: bandwidth")
    result.ceiling = _better(result.ceiling, device)
    for pair in pairs:
        guarded(measure_held, *pair)
    # Once more, for a machine that was busy the first time.
    result.ceiling = _better(result.ceiling, device)


def _better(known: Ceiling | None, device: torch.device) -> Ceiling | None:
    """The ceiling, measured again; what is known where there is no room for the buffer."""
    try:
        found = measure_ceiling(device)
    except torch.OutOfMemoryError:
        return known
    return found if known is None or found.bytes_per_second > known.bytes_per_second else known


def _guarded(
    action: Callable[[ContenderRun, Measurement], None],
    contender: ContenderRun,
    measurement: Measurement,
    *,
    keep_going: bool,
) -> None:
    """Do it, and take note where a contender cannot; it is left out from then on."""
    if measurement.failure is not None:
        return
    try:
        action(contender, measurement)
        return
    except (KvpressError, HeadwiseError) as error:
        measurement.failure = str(error)
    except Exception as error:
        out_of_memory = _is_out_of_memory(error)
        if not (out_of_memory or keep_going):
            raise
        measurement.failure = OUT_OF_MEMORY if out_of_memory else f"{type(error).__name__}: {error}"
    # Behind the handler: the error's traceback would keep alive what has to go.
    contender.close()
    free_memory()


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
