"""Bench-vllm: options -> vLLM with headwise and without on the same loads, as a table and JSON."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headwise.cli import options
from headwise.cli.exit_codes import INTERRUPTED
from headwise.cli.tables import figures_tables, message, output
from headwise.errors import ConfigurationError

if TYPE_CHECKING:
    from headwise.bench.vllm_rounds import Load

_LOADS = "Loads"

Cache = Annotated[
    int, typer.Option(min=1, metavar="MIB", help="Of the load that is short of it.", rich_help_panel=_LOADS)
]
Requests = Annotated[int, typer.Option(min=1, metavar="N", help="That come at once there.", rich_help_panel=_LOADS)]
Prompt = Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of each.", rich_help_panel=_LOADS)]
New = Annotated[int, typer.Option(min=2, metavar="N", help="Tokens that each writes.", rich_help_panel=_LOADS)]
Batch = Annotated[int, typer.Option(min=1, metavar="N", help="Requests with memory to spare.", rich_help_panel=_LOADS)]
Context = Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of each of these.", rich_help_panel=_LOADS)]
PolicyWords = Annotated[str, typer.Option("--policy", metavar="NAME", help="Of compressed requests.")]
Ratio = Annotated[float, typer.Option(metavar="X", help="Of the blocks of a prompt that stay.")]
BlockSize = Annotated[int, typer.Option(min=1, metavar="N", help="Tokens in a block of vLLM.")]
Rounds = Annotated[int, typer.Option(min=1, metavar="N", help="Each of both engines in turn.")]
Out = Annotated[
    Path | None, typer.Option(metavar="FILE", help="All measurements, as JSON.", rich_help_panel=options.OUTPUT)
]


def bench_vllm(
    cache: Cache = 192,
    requests: Requests = 10,
    prompt: Prompt = 1000,
    new: New = 128,
    batch: Batch = 8,
    context: Context = 2048,
    policy: PolicyWords = "adakv:over=snapkv",
    ratio: Ratio = 0.25,
    block_size: BlockSize = 32,
    rounds: Rounds = 3,
    model: options.Model = None,
    dtype: options.Dtype = "auto",
    out: Out = None,
) -> None:
    """Measure vLLM with headwise beside vLLM without, on the same engine options, in turn.

    Two loads: more requests than the cache has room for, and a batch with memory to spare. Takes about a quarter of an
    hour. Every engine is a process of its own.
    """
    from headwise.bench.vllm_rounds import Asked, Load, run
    from headwise.hosts.transformers.models import find_default_model
    from headwise.hosts.vllm.options import Options

    if importlib.util.find_spec("vllm") is None:
        raise ConfigurationError(
            "vLLM is not installed here: pip install 'headwise[vllm]' into the environment that has it"
        )
    keeps = Options(policy, ratio).to_dict()
    folder = str(find_default_model() if model is None else model)
    loads = [Load("short of memory", cache, requests, prompt, new), _roomy(folder, batch, context, dtype, block_size)]
    asked = Asked(folder, _text(folder), keeps, "float32" if dtype == "auto" else dtype, block_size, loads, rounds)
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    interrupted = False
    try:
        for load, kind, taken in run(asked, lambda text: message(f"{text}\n")):
            found.setdefault((load, kind), []).append(taken)
    except KeyboardInterrupt:
        interrupted = True
    _show(loads, found)
    if out is not None:
        plain = [{"load": load, "requests": kind, "rounds": each} for (load, kind), each in found.items()]
        out.write_text(json.dumps({"keeps": keeps, "dtype": asked.dtype, "found": plain}, indent=1), encoding="utf-8")
    if interrupted:
        raise typer.Exit(INTERRUPTED)


def _roomy(folder: str, batch: int, context: int, dtype: str, block_size: int) -> Load:
    """A batch that there is room for."""
    from transformers import AutoConfig

    from headwise.bench.vllm_rounds import Load

    new = 64
    config = AutoConfig.from_pretrained(folder).get_text_config()
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = config.num_hidden_layers * config.num_key_value_heads * 2 * dim * (4 if dtype in ("auto", "float32") else 2)
    return Load(
        "memory to spare",
        -(-token * batch * (context + new + 2 * block_size) * 11 // (10 * 2**20)),
        batch,
        context,
        new,
    )


def _text(folder: str) -> list[int]:
    """Tokens of a text that everybody has."""
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    words = "\n\n".join(topics[name] for name in sorted(topics))
    return list(AutoTokenizer.from_pretrained(folder)(words, verbose=False)["input_ids"])


def _show(loads: list[Load], found: dict[tuple[str, str], list[dict[str, Any]]]) -> None:
    from headwise.bench.vllm_rounds import COMPRESSED, PLAIN, STOCK, summary

    for load in loads:
        size = f"{load.requests} x {load.prompt} + {load.new} tokens, {load.cache} MiB"
        columns = ("", "at once", "preempted", "cache used", "tokens/s", "first token, s", "per token, ms", "step, ms")
        message(f"\n{load.name}: {size}\n")
        rows = []
        kinds = {STOCK: "vLLM alone", PLAIN: "with headwise, plain requests", COMPRESSED: "with headwise, compressed"}
        for kind, words in kinds.items():
            if (load.name, kind) not in found:
                continue
            own = summary(found[load.name, kind])
            step = "" if own["step"] is None else f"{1000 * own['step']:.1f}"
            rows.append(
                [
                    words,
                    f"{own['at_once']:.0f}",
                    f"{own['preemptions']:.0f}",
                    f"{100 * (own['usage'] or 0):.0f} %",
                    f"{own['tokens_per_second']:.1f}",
                    f"{own['first_token']:.1f}",
                    f"{1000 * (own['per_token'] or 0):.0f}",
                    step,
                ]
            )
        console = output()
        for table in figures_tables(columns, rows, console):
            console.print(table)
