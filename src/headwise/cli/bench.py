"""Bench: options -> headwise measured against transformers' own caches, as a table, JSON and a picture."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from headwise.cli import options
from headwise.cli.bench_tables import show_record
from headwise.cli.loading import load, parse_device, parse_dtype
from headwise.cli.tables import message
from headwise.errors import ConfigurationError
from headwise.report.picture import check_target

if TYPE_CHECKING:
    import torch

    from headwise.bench.plan import Plan
    from headwise.bench.record import Record
    from headwise.bench.run import Subject

_WORKLOAD = "Workload"
_CANDIDATES = "Candidates"
_INTERRUPTED = 130

_DEFAULT_CONTEXT = "512,2048"
_DEFAULT_KEEP = "0.5,0.25"

T = TypeVar("T")


def bench(
    batch: Annotated[
        str | None, typer.Option(metavar="N,...", help="Sequences at a time; 1.", rich_help_panel=_WORKLOAD)
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(metavar="N,...", help=f"Tokens of the prompt; {_DEFAULT_CONTEXT}.", rich_help_panel=_WORKLOAD),
    ] = None,
    distinct: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Read so many sequences of a batch, and repeat them.", rich_help_panel=_WORKLOAD
        ),
    ] = None,
    steps: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Tokens that a candidate decodes in a round.", rich_help_panel=_WORKLOAD),
    ] = 32,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="Rounds that count.", rich_help_panel=_WORKLOAD)] = 5,
    targets: Annotated[
        bool,
        typer.Option("--targets", help="Run what the expectations are about.", rich_help_panel=_WORKLOAD),
    ] = False,
    keep: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE,...", help=f"Shares of the prompt to keep; {_DEFAULT_KEEP}.", rich_help_panel=_CANDIDATES
        ),
    ] = None,
    policy: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="What keeps them: h2o, streamingllm, window or random. h2o costs the most.",
            rich_help_panel=_CANDIDATES,
        ),
    ] = "h2o",
    recovery: Annotated[
        str | None,
        typer.Option(metavar="SHARE,...", help="Run FastGen with these recoveries too.", rich_help_panel=_CANDIDATES),
    ] = None,
    graph: Annotated[
        bool,
        typer.Option(
            "--graph", help="Run headwise's caches with a captured step too, on a GPU.", rich_help_panel=_CANDIDATES
        ),
    ] = False,
    bits: Annotated[
        str | None,
        typer.Option(
            metavar="WORD,...",
            help="Run headwise's caches with all but the newest rows in so few bits too: int8, int4, k8v4 or k4v8.",
            rich_help_panel=_CANDIDATES,
        ),
    ] = None,
    cache_dtype: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Run headwise's caches with exact rows in these too: float16, bfloat16 or float32.",
            rich_help_panel=_CANDIDATES,
        ),
    ] = None,
    less: options.Less = False,
    less_kernels: options.LessKernels = None,
    quantized: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="transformers' quantized cache: quanto, hqq, fp8, none, or auto: the first that is installed.",
            rich_help_panel=_CANDIDATES,
        ),
    ] = "auto",
    kvpress: Annotated[
        str | None,
        typer.Option(metavar="PYTHON", help="A Python that has kvpress, to run it too.", rich_help_panel=_CANDIDATES),
    ] = None,
    kvpress_press: Annotated[
        str, typer.Option(metavar="CLASS", help="Which of its presses.", rich_help_panel=_CANDIDATES)
    ] = "StreamingLLMPress",
    evict_every: options.EvictEvery = 16,
    model: options.Model = None,
    shape: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Random weights instead of a model: smollm2-135m, llama-7b, llama-3-8b, llama-3.2-1b, qwen2.5-7b, "
            "mistral-7b or tiny.",
            rich_help_panel=options.MODEL,
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help="float32, bfloat16, float16 or auto: float32 on a CPU, bfloat16 on a GPU.",
            rich_help_panel=options.MODEL,
        ),
    ] = "auto",
    device: options.Device = None,
    kernel: options.Kernel = "auto",
    json_output: options.Json = False,
    png: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write a picture of speed and memory against context length to this file.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
) -> None:
    """Measure headwise against transformers' own caches, in turn, in one process.

    Takes two or three minutes unless told otherwise. Progress goes to standard error.
    """
    if png is not None:
        check_target(png)

    from headwise.bench.machine import describe_machine, describe_versions
    from headwise.bench.plan import PROFILE_CONTEXT, Plan, grid
    from headwise.bench.plan import targets as target_configurations
    from headwise.bench.record import Record
    from headwise.bench.rivals import Rivals
    from headwise.bench.run import run
    from headwise.bench.stock import find_backend
    from headwise.hosts.transformers.models import default_device
    from headwise.kernels.backends import choose

    where = parse_device(device) or default_device()
    choose(kernel, where)
    if graph and where.type != "cuda":
        raise ConfigurationError(f"--graph needs a GPU, not {where}")
    dtypes = [_resolve(parse_dtype(name.strip()), where) for name in dtype.split(",")]
    notes: list[str] = []
    remember = less or less_kernels is not None
    if targets:
        given = {"batch": batch, "context": context, "distinct": distinct, "keep": keep, "recovery": recovery}
        _refuse(
            "--targets says what to run",
            **given,
            bits=bits,
            cache_dtype=cache_dtype,
            less=remember or None,
            kvpress=kvpress,
        )
        if len(dtypes) > 1:
            raise ConfigurationError("--targets takes one --dtype")
        if where.type == "cuda" and model is None and shape is None:
            shape = "llama-3-8b"
        configurations = target_configurations(where.type, dtypes[0], policy)
    else:
        if shape is not None and recovery is not None:
            raise ConfigurationError("--recovery needs a tokenizer, which a --shape does not have")
        shares = _shares("--keep", _DEFAULT_KEEP if keep is None else keep)
        recoveries = [] if recovery is None else _shares("--recovery", recovery)
        words = _words(bits)
        rows = [_row_dtype(name) for name in _words(cache_dtype)]
        if shape is not None and remember:
            raise ConfigurationError("--less needs a model, kernels are trained for one; random weights have none")
        backend, missing = find_backend(quantized)
        if missing is not None:
            notes.append(f"quantized: {missing}")
        press = kvpress and kvpress_press
        rivals = Rivals(policy, shares, recoveries, rows, words, graph, remember, less_kernels, backend, press)
        batches = _numbers("--batch", "1" if batch is None else batch, int)
        contexts = _numbers("--context", _DEFAULT_CONTEXT if context is None else context, int)
        configurations = grid(batches, contexts, dtypes, rivals.at, distinct)
    if steps % evict_every:
        notes.append(f"rounds of {steps} steps do not hold the same number of evictions, one every {evict_every}")
    profiled = targets or any((c.batch, c.context) == (1, PROFILE_CONTEXT) for c in configurations)
    repeats = (3 if targets else 1) if profiled and shape is None else 0
    plan = Plan(configurations, steps, rounds, kernel, evict_every, repeats)
    record = Record(describe_machine(where), versions=describe_versions(), notes=notes)
    record.settings = {"steps": steps, "rounds": rounds, "policy": policy, "kernel": kernel}
    record.settings |= {"evict_every": evict_every, "targets": targets}
    subject_of, name = _source(model, shape, where, plan)
    try:
        run(plan, name, subject_of, kvpress, record, lambda text: message(f"{text}\n"))
    except KeyboardInterrupt:
        record.interrupted = True
    _present(record, where.type, json_output, png)
    if record.interrupted:
        raise typer.Exit(_INTERRUPTED)


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


def _source(
    model: str | None, shape: str | None, device: torch.device, plan: Plan
) -> tuple[Callable[[torch.dtype], Subject], str]:
    """What makes the model in a dtype, and how the tables call it; impossible shapes are refused here."""
    from headwise.bench.run import Subject, check_memory
    from headwise.bench.shapes import find_shape
    from headwise.bench.stock import random_model
    from headwise.hosts.transformers.models import DEFAULT_MODEL

    if shape is None:

        def loaded(dtype: torch.dtype) -> Subject:
            return Subject(*load(model, dtype, device))

        return loaded, model or os.environ.get("HEADWISE_MODEL") or DEFAULT_MODEL
    if model is not None:
        raise ConfigurationError("give --model or --shape, not both")
    dimensions = find_shape(shape)
    plan.check_positions(dimensions.positions)
    widest = max(configuration.dtype.itemsize for configuration in plan.configurations)
    check_memory(plan, device, dimensions.row_bytes, dimensions.parameters * widest)

    def made(dtype: torch.dtype) -> Subject:
        message(f"making {dimensions.parameters:,} random weights\n")
        return Subject(random_model(dimensions, dtype, device), None, dimensions)

    return made, f"{shape} (random weights)"


def _resolve(dtype: torch.dtype | None, device: torch.device) -> torch.dtype:
    import torch

    return dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)


def _words(text: str | None) -> list[str]:
    return [] if text is None else [word.strip() for word in text.split(",")]


def _row_dtype(name: str) -> torch.dtype:
    dtype = parse_dtype(name)
    if dtype is None:
        raise ConfigurationError(
            "--cache-dtype takes float16, bfloat16 or float32 here; rows in the model's always run"
        )
    return dtype


def _refuse(why: str, **given: object) -> None:
    named = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None]
    if named:
        raise ConfigurationError(f"{why}; leave out {', '.join(named)}")


def _shares(name: str, text: str) -> list[float]:
    from headwise.bench.plan import check_share

    shares = _numbers(name, text, float)
    for share in shares:
        check_share(name, share)
    return shares


def _numbers(name: str, text: str, kind: Callable[[str], T]) -> list[T]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ConfigurationError(f"{name} takes numbers with commas between them, got {text!r}") from None
