"""Run: a plan and a way to a model -> a record, filled in as far as the run gets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from headwise.bench.contender_run import ContenderRun, LocalRun, free_memory
from headwise.bench.contenders import KVPRESS, alone, dtype_name
from headwise.bench.kvpress_process import KvpressError, KvpressProcess, KvpressRun
from headwise.bench.models import Model, Tokenizer, llama_dimensions
from headwise.bench.plan import Configuration, Plan
from headwise.bench.prefill import measure_prefills
from headwise.bench.record import Measurement, PrefillCosts, Record, Result
from headwise.bench.rounds import run_rounds
from headwise.bench.workload import random_ids, text_ids
from headwise.errors import InputError
from headwise.hosts.transformers.model_facts import read_facts
from headwise.measure.model_info import Shape, available_bytes, describe_model, positions
from headwise.types import Int, Tensor
from headwise.units import format_bytes

# What else there is beside weights and caches: activations, the buffer that bandwidth is measured with.
_HEADROOM = 2**30


@dataclass(frozen=True)
class BenchModel:
    """The model that all contenders run on.

    Attributes:
        tokenizer: None for made-up weights.
        shape: of made-up weights; None for a model that was loaded.
    """

    model: Model
    tokenizer: Tokenizer | None
    shape: Shape | None = None

    def ids(self, batch: int, length: int) -> Int[Tensor, "b t"]:
        """Tokens to read: text, or random ones where there is no tokenizer."""
        if self.tokenizer is None:
            return random_ids(self.model.config.vocab_size, batch, length)
        return text_ids(self.tokenizer, batch, length)

    def describe(self, name: str) -> dict[str, Any]:
        """Plain values."""
        return describe_model(self.model, name, random_weights=self.shape is not None)

    def for_kvpress(self) -> dict[str, Any]:
        """How another process gets the same model."""
        if self.shape is not None:
            return {"config": llama_dimensions(self.shape)}
        return {"folder": self.model.config._name_or_path}


def run(
    plan: Plan,
    name: str,
    load_model: Callable[[torch.dtype], BenchModel],
    python: str | None,
    record: Record,
    say: Callable[[str], None],
) -> None:
    """Measure everything, dtype by dtype.

    Args:
        name: of the model.
        load_model: loads it in a dtype.
        python: an interpreter that has kvpress, where a contender needs it.
        record: what to fill.
        say: takes a word on how far it is.

    Raises:
        InputError: when contexts or memory do not suffice.
    """
    for dtype in dict.fromkeys(configuration.dtype for configuration in plan.configurations):
        made = load_model(dtype)
        plan.check_positions(positions(made.model))
        check_memory(plan, made.model.device, read_facts(made.model)[0].token_bytes)
        record.model = made.describe(name)
        process = None if python is None else KvpressProcess(python)
        try:
            obstacle = None if process is None else _load(process, made, record, say)
            for configuration in plan.configurations:
                if configuration.dtype == dtype:
                    _run_one(configuration, plan, made, process, obstacle, record, say)
            if plan.prefill_context and record.prefills is None:
                record.prefills = PrefillCosts(plan.prefill_context, dtype_name(dtype))
                ids = made.ids(1, plan.prefill_context)
                measure_prefills(record.prefills, made.model, made.tokenizer, ids, plan, say)
        finally:
            if process is not None:
                process.close()


def check_memory(plan: Plan, device: torch.device, row_bytes: Callable[[torch.dtype], int], weights: int = 0) -> None:
    """Refuse what cannot fit before it is begun.

    On a GPU only the weights are looked at: a cache that does not fit is a result, and is reported as one. On a
    CPU it would end in a frozen machine or a killed process.

    Args:
        row_bytes: of a full cache, per token of a sequence, by dtype.
        weights: bytes of weights that are yet to be made.

    Raises:
        InputError: with what is needed and what there is.
    """
    needed = weights if device.type == "cuda" else weights + plan.cache_bytes(row_bytes) + _HEADROOM
    there = available_bytes(device)
    if needed > there:
        raise InputError(
            f"this needs about {format_bytes(needed)} of memory and {device} has {format_bytes(there)} available; "
            "try a smaller shape, batch or context, fewer candidates, or --dtype bfloat16"
        )


def _run_one(
    configuration: Configuration,
    plan: Plan,
    made: BenchModel,
    process: KvpressProcess | None,
    obstacle: str | None,
    record: Record,
    say: Callable[[str], None],
) -> None:
    result = Result(configuration, plan.steps, [])
    record.results.append(result)
    pairs: list[tuple[ContenderRun, Measurement]] = []
    for contender in configuration.contenders:
        measurement = Measurement(contender.name, contender.kind, contender.setting, contender.keep, contender.coded)
        result.measurements.append(measurement)
        if contender.kind != KVPRESS:
            pairs.append((LocalRun(contender, made.model, made.tokenizer, plan), measurement))
        elif process is not None and obstacle is None:
            pairs.append((KvpressRun(contender, process), measurement))
        else:
            measurement.failure = obstacle or "there is no Python to run it"
    own = alone()
    result.own = Measurement(own.name, own.kind, own.setting)
    pairs.append((LocalRun(own, made.model, made.tokenizer, plan), result.own))
    ids = made.ids(configuration.batch, configuration.context + plan.new_tokens)
    try:
        run_rounds(pairs, result, ids, plan, made.model.device, say)
    finally:
        for contender_run, _ in pairs:
            contender_run.close()
        free_memory()


def _load(process: KvpressProcess, made: BenchModel, record: Record, say: Callable[[str], None]) -> str | None:
    """Let the other process load the model; returns why it cannot."""
    say("kvpress loads the model")
    try:
        versions = process.load(made.for_kvpress(), made.model.dtype, made.model.device)
    except (KvpressError, torch.OutOfMemoryError) as error:
        return str(error)
    record.versions |= {f"peer: {package}": str(version) for package, version in versions.items()}
    return None
