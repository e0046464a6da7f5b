"""Bench options: what `headwise bench` alone takes -> annotations that typer reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headwise.cli import options

_WORKLOAD = "Workload"
_CANDIDATES = "Candidates"

DEFAULT_BATCH = "1"
DEFAULT_CONTEXT = "512,2048"
DEFAULT_KEEP = "0.5,0.25"

Batch = Annotated[
    str | None,
    typer.Option(metavar="N,...", help=f"Sequences at a time; {DEFAULT_BATCH}.", rich_help_panel=_WORKLOAD),
]
Context = Annotated[
    str | None,
    typer.Option(metavar="N,...", help=f"Tokens of the prompt; {DEFAULT_CONTEXT}.", rich_help_panel=_WORKLOAD),
]
Distinct = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Read so many sequences of a batch, and repeat them.", rich_help_panel=_WORKLOAD
    ),
]
Steps = Annotated[
    int,
    typer.Option(min=1, metavar="N", help="Tokens that a candidate decodes in a round.", rich_help_panel=_WORKLOAD),
]
Rounds = Annotated[int, typer.Option(min=1, metavar="N", help="Rounds that count.", rich_help_panel=_WORKLOAD)]
Targets = Annotated[
    bool, typer.Option("--targets", help="Run what the expectations are about.", rich_help_panel=_WORKLOAD)
]
Keep = Annotated[
    str | None,
    typer.Option(
        metavar="SHARE,...", help=f"Shares of the prompt to keep; {DEFAULT_KEEP}.", rich_help_panel=_CANDIDATES
    ),
]
PolicyName = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="What keeps them: h2o, streamingllm, window or random. h2o costs the most.",
        rich_help_panel=_CANDIDATES,
    ),
]
Recoveries = Annotated[
    str | None,
    typer.Option(metavar="SHARE,...", help="Run FastGen with these recoveries too.", rich_help_panel=_CANDIDATES),
]
Graph = Annotated[
    bool,
    typer.Option(
        "--graph", help="Run headwise's caches with a captured step too, on a GPU.", rich_help_panel=_CANDIDATES
    ),
]
Bits = Annotated[
    str | None,
    typer.Option(
        metavar="WORD,...",
        help="Run headwise's caches with all but the newest rows in so few bits too: int8, int4, k8v4 or k4v8.",
        rich_help_panel=_CANDIDATES,
    ),
]
CacheDtypes = Annotated[
    str | None,
    typer.Option(
        metavar="NAME,...",
        help="Run headwise's caches with exact rows in these too: float16, bfloat16 or float32.",
        rich_help_panel=_CANDIDATES,
    ),
]
Quantized = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="transformers' quantized cache: quanto, hqq, fp8, none, or auto: the first that is installed.",
        rich_help_panel=_CANDIDATES,
    ),
]
Kvpress = Annotated[
    str | None,
    typer.Option(metavar="PYTHON", help="A Python that has kvpress, to run it too.", rich_help_panel=_CANDIDATES),
]
KvpressPress = Annotated[str, typer.Option(metavar="CLASS", help="Which of its presses.", rich_help_panel=_CANDIDATES)]
Shape = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Random weights instead of a model: smollm2-135m, llama-7b, llama-3-8b, llama-3.2-1b, qwen2.5-7b, "
        "mistral-7b or tiny.",
        rich_help_panel=options.MODEL,
    ),
]
Dtypes = Annotated[
    str,
    typer.Option(
        metavar="NAME,...",
        help="float32, bfloat16, float16 or auto: float32 on a CPU, bfloat16 on a GPU.",
        rich_help_panel=options.MODEL,
    ),
]
Png = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Write a picture of speed and memory against context length to this file.",
        rich_help_panel=options.OUTPUT,
    ),
]
