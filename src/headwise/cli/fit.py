"""Fit: a model's name, a context, a batch and memory -> what fits, before anything is loaded."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from headwise.cli import options
from headwise.cli.loading import parse_dtype
from headwise.cli.tables import figures_tables, message, output
from headwise.errors import InputError

if TYPE_CHECKING:
    from headwise.measure.fit import Option
    from headwise.measure.sizes import ModelSizes

Context = Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of the prompt.", rich_help_panel=options.INPUT)]
Batch = Annotated[int, typer.Option(min=1, metavar="N", help="Sequences at once.", rich_help_panel=options.INPUT)]
Memory = Annotated[
    str,
    typer.Option(
        metavar="BYTES",
        help="Memory there is for weights, cache and work, such as 6GiB.",
        rich_help_panel=options.INPUT,
    ),
]


def fit(
    context: Context,
    memory: Memory,
    batch: Batch = 1,
    prefill_chunk: options.PrefillChunk = None,
    model: options.Model = None,
    dtype: options.Dtype = "auto",
    json_output: options.Json = False,
) -> None:
    """Say what fits into memory, which policy and size to take, and what that costs: before anything is loaded."""
    import torch

    from headwise.hosts.transformers.models import default_device, load_config
    from headwise.measure.fit import longest, recommended
    from headwise.measure.fit import options as options_of
    from headwise.measure.sizes import model_sizes
    from headwise.units import parse_bytes

    room, wanted = parse_bytes(memory), parse_dtype(dtype)
    name, config = load_config(model)
    # As it would be loaded here.
    numbers = wanted or (torch.float32 if default_device().type == "cpu" else torch.bfloat16)
    sizes = model_sizes(config, numbers)
    if sizes.positions is not None and context > sizes.positions:
        raise InputError(f"{name} has room for {sizes.positions:,} tokens, and {context:,} were asked for")
    found = options_of(sizes, context, batch, prefill_chunk)
    best = recommended(found, room)
    limits = {option.policy: longest(sizes, batch, room, option.policy, prefill_chunk) for option in found}
    if json_output:
        output().out(json.dumps(_to_dict(name, sizes, found, best, limits), indent=2))
        return
    _show(name, str(numbers).removeprefix("torch."), sizes, found, room, limits)
    _advise(best, f"{batch} x {context:,} tokens", found, limits, chunked=prefill_chunk is not None)


def _to_dict(
    name: str, sizes: ModelSizes, found: list[Option], best: Option | None, limits: dict[str, int]
) -> dict[str, object]:
    return {
        "model": name,
        "parameters": sizes.parameters,
        "weight_bytes": sizes.weight_bytes,
        "layers": len(sizes.layers),
        "compressed_layers": len(sizes.compressed),
        "token_bytes": sizes.token_bytes,
        "recommended": None if best is None else best.policy,
        "options": [
            {
                "policy": option.policy,
                "held_bytes": option.held,
                "reading_bytes": option.reading,
                "writing_bytes": option.writing,
                "kl": option.kl,
                "longest_context": limits[option.policy],
            }
            for option in found
        ],
    }


def _show(name: str, dtype: str, sizes: ModelSizes, found: list[Option], room: int, limits: dict[str, int]) -> None:
    from headwise.units import format_bytes

    console = output()
    console.print(
        f"{name}: {sizes.parameters / 1e9:.2f} billion weights, {format_bytes(sizes.weight_bytes)} in {dtype}; "
        f"{len(sizes.compressed)} of {len(sizes.layers)} layers keep every token, in {format_bytes(sizes.token_bytes)}"
    )
    rows = [
        [
            option.policy,
            format_bytes(option.held),
            format_bytes(option.reading),
            format_bytes(option.writing),
            "yes" if option.peak <= room else "no",
            f"{limits[option.policy]:,}",
            "-" if option.kl is None else f"{option.kl:.2g}",
        ]
        for option in found
    ]
    heads = ["policy", "cache", "reading", "writing", "fits", "longest context", "KL"]
    for table in figures_tables(heads, rows, console):
        console.print(table)


def _advise(best: Option | None, what: str, found: list[Option], limits: dict[str, int], *, chunked: bool) -> None:
    console = output()
    if best is None:
        most = max(found, key=lambda option: limits[option.policy])
        smaller = (
            "take fewer sequences"
            if chunked
            else "read the prompt in pieces (--prefill-chunk), or take fewer sequences"
        )
        console.print(f"{what} do not fit. {most.policy} fits {limits[most.policy]:,}; or {smaller}.")
    elif best.kl is None:
        console.print("All rows fit. A smaller cache is still read faster, and leaves room for more sequences.")
    else:
        console.print(f"Take --policy {best.policy}; in Python:")
        console.print(f'    cache = headwise.HeadwiseCache(model, "{best.policy}", tokenizer=tokenizer)')
    message(
        "\nCache: after the prompt. Reading: the most while the prompt is read, with weights and what a layer works\n"
        "with, to a quarter; auto decides over all layers, so it holds all rows until then. KL: to the full cache,\n"
        "nats per token, as recorded for SmolLM2-135M and 2,048 tokens: auto by gates and of the prompt, on eight\n"
        "passages; snapkv on three of prose (on those eight 0.073 at a quarter). Models without gates, and long\n"
        "answers, lose more: measure yours with headwise eval fidelity.\n"
    )
