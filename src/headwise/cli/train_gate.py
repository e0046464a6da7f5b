"""Train-gate: a model and texts -> a folder with gates that predict what a repetition of a prompt would find."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headwise.cli import options
from headwise.cli.eval_run import progress
from headwise.cli.loading import load, parse_device, parse_dtype
from headwise.cli.tables import message, output, plain_table
from headwise.errors import ConfigurationError

_TRAINING = "Training"


def train_gate(
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the gates go.", rich_help_panel=options.OUTPUT)],
    text: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="UTF-8 text to learn from; may be repeated. Default: Python's manual of topics.",
            rich_help_panel=options.INPUT,
        ),
    ] = None,
    model: options.Model = None,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    sequences: Annotated[
        int, typer.Option(min=10, metavar="N", help="Passages; every tenth only checks.", rich_help_panel=_TRAINING)
    ] = 48,
    shortest: Annotated[
        int, typer.Option(min=64, metavar="N", help="Tokens of the shortest.", rich_help_panel=_TRAINING)
    ] = 512,
    longest: Annotated[
        int, typer.Option(min=64, metavar="N", help="Tokens of the longest.", rich_help_panel=_TRAINING)
    ] = 2048,
    width: Annotated[
        int, typer.Option(min=1, metavar="E", help="Hidden units of a gate.", rich_help_panel=_TRAINING)
    ] = 256,
    epochs: Annotated[
        int, typer.Option(min=1, metavar="N", help="Passes over the tokens.", rich_help_panel=_TRAINING)
    ] = 8,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens in a step.", rich_help_panel=_TRAINING)] = 512,
    rate: Annotated[
        float, typer.Option(min=0, metavar="X", help="Of AdamW, at its highest.", rich_help_panel=_TRAINING)
    ] = 3e-3,
    decay: Annotated[float, typer.Option(min=0, metavar="X", help="Of the weights.", rich_help_panel=_TRAINING)] = 0.01,
    seed: Annotated[
        int, typer.Option(min=0, metavar="N", help="Of passages and weights.", rich_help_panel=_TRAINING)
    ] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run.", rich_help_panel=options.OUTPUT)
    ] = False,
) -> None:
    """Train the gates with which recite and kvzip do without a repetition of the prompt.

    The model is frozen, and each layer is trained alone. What is captured lies in FOLDER/work until the end.
    """
    from headwise.eval.text import read_documents
    from headwise.gate.checkpoint import save_gates
    from headwise.gate.run import GateRun, Recipe
    from headwise.gate.training import TrainingOptions

    if shortest > longest:
        raise ConfigurationError(f"the shortest passage cannot be longer than the longest: {shortest} and {longest}")
    training = TrainingOptions(width, epochs, batch, rate, decay, seed)
    texts = read_documents(text or ())
    loaded, tokenizer = load(model, parse_dtype(dtype), parse_device(device))
    recipe = Recipe(sequences, shortest, longest, training)
    run = GateRun(loaded, tokenizer, texts, recipe, out / "work", resume=resume)
    try:
        with progress() as tell:
            gates = run.run(lambda what, done, total: tell(done, total, what))
    except KeyboardInterrupt:
        message(f"go on with --resume; what is finished lies in {out / 'work'}\n")
        raise
    save_gates(gates, out)
    run.finish()
    _show(gates.about["layers"])
    message(f"gates: {out}\n")


def _show(layers: dict[str, float]) -> None:
    table = plain_table("layer", "rank correlation")
    for index, correlation in layers.items():
        table.add_row(index, f"{correlation:.3f}")
    table.add_row("mean", f"{sum(layers.values()) / len(layers):.3f}")
    output().print(table)
