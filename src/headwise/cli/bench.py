"""Bench: options -> headwise measured against transformers' own caches, as a table, JSON and a picture."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from headwise.cli import bench_options, options
from headwise.cli.bench_request import BenchRequest, resolve_dtypes
from headwise.cli.bench_tables import show_record
from headwise.cli.exit_codes import INTERRUPTED
from headwise.cli.loading import load, parse_device
from headwise.cli.tables import message
from headwise.errors import ConfigurationError

if TYPE_CHECKING:
    import torch

    from headwise.bench.plan import Plan
    from headwise.bench.record import Record
    from headwise.bench.run import BenchModel

# What the expectations of a GPU are about.
_GPU_SHAPE = "llama-3-8b"


def bench(
    batch: bench_options.Batch = None,
    context: bench_options.Context = None,
    distinct: bench_options.Distinct = None,
    steps: bench_options.Steps = 32,
    rounds: bench_options.Rounds = 5,
    targets: bench_options.Targets = False,
    keep: bench_options.Keep = None,
    policy: bench_options.PolicyName = "h2o",
    recovery: bench_options.Recoveries = None,
    graph: bench_options.Graph = False,
    bits: bench_options.Bits = None,
    cache_dtype: bench_options.CacheDtypes = None,
    less: options.Less = False,
    less_kernels: options.LessKernels = None,
    quantized: bench_options.Quantized = "auto",
    kvpress: bench_options.Kvpress = None,
    kvpress_press: bench_options.KvpressPress = "StreamingLLMPress",
    evict_every: options.EvictEvery = 16,
    model: options.Model = None,
    shape: bench_options.Shape = None,
    dtype: bench_options.Dtypes = "auto",
    device: options.Device = None,
    kernel: options.Kernel = "auto",
    json_output: options.Json = False,
    png: bench_options.Png = None,
) -> None:
    """Measure headwise against transformers' own caches, in turn, in one process.

    Takes two or three minutes unless told otherwise. Progress goes to standard error.
    """
    from headwise.bench.plan import PREFILL_CONTEXT, Plan
    from headwise.bench.record import Record
    from headwise.bench.run import run
    from headwise.hosts.transformers.models import default_device
    from headwise.kernels.backends import choose
    from headwise.measure.machine import describe_machine, describe_versions
    from headwise.report.picture import check_target

    if png is not None:
        check_target(png)

    where = parse_device(device) or default_device()
    choose(kernel, where)
    if graph and where.type != "cuda":
        raise ConfigurationError(f"--graph needs a GPU, not {where}")
    dtypes = resolve_dtypes(dtype, where)
    if targets and where.type == "cuda" and model is None and shape is None:
        shape = _GPU_SHAPE
    request = BenchRequest(
        batch=batch,
        context=context,
        distinct=distinct,
        keep=keep,
        policy=policy,
        recovery=recovery,
        graph=graph,
        bits=bits,
        cache_dtype=cache_dtype,
        less=less,
        less_kernels=less_kernels,
        quantized=quantized,
        kvpress=kvpress,
        kvpress_press=kvpress_press,
        shape=shape,
    )
    notes: list[str] = []
    configurations = request.targets(where, dtypes) if targets else request.grid(dtypes, notes)
    if steps % evict_every:
        notes.append(f"rounds of {steps} steps do not hold the same number of evictions, one every {evict_every}")
    # As the expectations have it.
    read = PREFILL_CONTEXT[where.type] if targets else 0
    plan = Plan(configurations, steps, rounds, kernel, evict_every, read)
    record = Record(describe_machine(where), versions=describe_versions(), notes=notes)
    record.settings = {"steps": steps, "rounds": rounds, "policy": policy, "kernel": kernel}
    record.settings |= {"evict_every": evict_every, "targets": targets}
    load_model, name = _model_source(model, shape, where, plan)
    try:
        run(plan, name, load_model, kvpress, record, lambda text: message(f"{text}\n"))
    except KeyboardInterrupt:
        record.interrupted = True
    _present(record, where.type, json_output, png)
    if record.interrupted:
        raise typer.Exit(INTERRUPTED)


def _present(record: Record, device: str, json_output: bool, png: Path | None) -> None:
    from headwise.bench.expectations import WRITTEN_FOR, judge
    from headwise.bench.picture import save_picture

    verdicts, written_for = judge(record, device), WRITTEN_FOR.get(device)
    if json_output:
        judged = {"written_for": written_for, "expectations": [verdict.to_dict() for verdict in verdicts]}
        typer.echo(json.dumps({**record.to_dict(), **judged}, indent=2, allow_nan=False))
    else:
        show_record(record, verdicts, written_for)
    if png is not None and any(m.round_seconds for result in record.results for m in result.measurements):
        save_picture(record, png)
        message(f"picture: {png}\n")


def _model_source(
    model: str | None, shape: str | None, device: torch.device, plan: Plan
) -> tuple[Callable[[torch.dtype], BenchModel], str]:
    """What makes the model in a dtype, and how the tables call it; impossible shapes are refused here."""
    from headwise.bench.models import random_model
    from headwise.bench.run import BenchModel, check_memory
    from headwise.hosts.transformers.models import DEFAULT_MODEL
    from headwise.measure.model_info import find_shape

    if shape is None:

        def loaded(dtype: torch.dtype) -> BenchModel:
            return BenchModel(*load(model, dtype, device))

        return loaded, model or os.environ.get("HEADWISE_MODEL") or DEFAULT_MODEL
    if model is not None:
        raise ConfigurationError("give --model or --shape, not both")
    dimensions = find_shape(shape)
    plan.check_positions(dimensions.positions)
    widest = max(configuration.dtype.itemsize for configuration in plan.configurations)
    check_memory(plan, device, dimensions.row_bytes, dimensions.parameters * widest)

    def made(dtype: torch.dtype) -> BenchModel:
        message(f"making {dimensions.parameters:,} random weights\n")
        return BenchModel(random_model(dimensions, dtype, device), None, dimensions)

    return made, f"{shape} (random weights)"
