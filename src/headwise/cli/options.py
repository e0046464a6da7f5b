"""Options: what several commands take, defined once -> annotations that typer reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

INPUT = "Input"
POLICY = "Policy"
MODEL = "Model"
OUTPUT = "Output"
SAMPLING = "Sampling"

Prompt = Annotated[
    str | None,
    typer.Option(
        "--prompt",
        "-p",
        metavar="TEXT",
        help="What to say to the model; with --file, a question about it.",
        rich_help_panel=INPUT,
    ),
]
File = Annotated[
    str | None,
    typer.Option("--file", "-f", metavar="PATH", help="Read a UTF-8 file; - is standard input.", rich_help_panel=INPUT),
]
Raw = Annotated[
    bool,
    typer.Option("--raw", help="Give the text to the model without its chat template.", rich_help_panel=INPUT),
]
PolicyName = Annotated[
    str,
    typer.Option(
        "--policy",
        metavar="SPEC",
        help="What to keep: a name, or one with parameters such as snapkv:keep=0.25; `headwise policies` lists them.",
        rich_help_panel=POLICY,
    ),
]
Recommended = Annotated[
    str | None,
    typer.Option(
        "--policy",
        metavar="SPEC",
        help="What to keep: a name, or one with parameters such as snapkv:keep=0.25+int8; `headwise policies` lists "
        "them. Unless given, auto:ratio=0.25+match, by gates where there are some for the model.",
        rich_help_panel=POLICY,
    ),
]
Recovery = Annotated[
    float | None,
    typer.Option(
        "--recovery",
        metavar="SHARE",
        help="Attention mass a rule must retain, from 0 to 1; 0.95 unless given, for the policies that have it.",
        rich_help_panel=POLICY,
    ),
]
Budget = Annotated[
    str | None,
    typer.Option(
        "--budget",
        metavar="SIZE",
        help="Room for the prompt, whatever else is set: tokens per KV head (512), a share (0.25), or bytes (64MiB).",
        rich_help_panel=POLICY,
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Any other parameter of the policy; may be repeated. 64 is a count, 0.5 a fraction.",
        rich_help_panel=POLICY,
    ),
]
Less = Annotated[
    bool,
    typer.Option(
        "--less",
        help="Fold what is evicted into a small state that can still be queried (LESS).",
        rich_help_panel=POLICY,
    ),
]
LessKernels = Annotated[
    Path | None,
    typer.Option(
        "--less-kernels",
        metavar="FOLDER",
        help="LESS with the kernels that `headwise train-less` wrote, instead of those for the default model.",
        rich_help_panel=POLICY,
    ),
]
Match = Annotated[
    bool,
    typer.Option(
        "--match",
        help="Refit the rows that stay, so that they stand for those that are dropped.",
        rich_help_panel=POLICY,
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", metavar="NAME", help="Hub id or folder, instead of the default model.", rich_help_panel=MODEL
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="NAME",
        help="float32, bfloat16, float16 or auto: float32 on a CPU, bfloat16 on a GPU.",
        rich_help_panel=MODEL,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device", metavar="NAME", help="cpu, cuda, cuda:1 ...; the GPU where there is one.", rich_help_panel=MODEL
    ),
]
Kernel = Annotated[
    str,
    typer.Option(
        "--kernel",
        metavar="NAME",
        help="cpu (compiled), triton, reference (plain torch), or auto: the fastest that runs on the device.",
        rich_help_panel=MODEL,
    ),
]
Bits = Annotated[
    str | None,
    typer.Option(
        "--bits",
        metavar="WORD",
        help="Store all but the newest rows in so few bits: int8, int4, or k8v4 for keys in 8 and values in 4.",
        rich_help_panel=POLICY,
    ),
]
CacheDtype = Annotated[
    str,
    typer.Option(
        "--cache-dtype",
        metavar="NAME",
        help="Of the rows: float32, bfloat16, float16 or auto, which is what the model computes in.",
        rich_help_panel=MODEL,
    ),
]
EvictEvery = Annotated[
    int,
    typer.Option(
        "--evict-every",
        metavar="N",
        min=1,
        help="New tokens between two evictions; 1 applies the rules after every token.",
        rich_help_panel=POLICY,
    ),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, metavar="N", help="New tokens at most.", rich_help_panel=SAMPLING)]
Temperature = Annotated[
    float, typer.Option(metavar="T", help="0 always takes the likeliest token.", rich_help_panel=SAMPLING)
]
Seed = Annotated[
    int | None,
    typer.Option(min=0, metavar="N", help="Of the draw, for a temperature over 0.", rich_help_panel=SAMPLING),
]
PrefillChunk = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Give the prompt in pieces of that many tokens.", rich_help_panel=MODEL),
]
Png = Annotated[
    Path | None,
    typer.Option(
        "--png", metavar="FILE", help="Write a picture of every head's rule to this file.", rich_help_panel=OUTPUT
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.", rich_help_panel=OUTPUT)]
