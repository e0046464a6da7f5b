"""Train-gate: a model and texts -> a folder with gates that predict what a repetition of a prompt would find."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headwise.cli import options
from headwise.cli.loading import load, parse_device, parse_dtype
from headwise.cli.tables import message, output, plain_table
from headwise.cli.training import (
    TRAINING,
    Longest,
    Resume,
    Seed,
    Sequences,
    Shortest,
    Texts,
    check_lengths,
    run_with_progress,
)

Out = Annotated[Path, typer.Option(metavar="FOLDER", help="Where the gates go.", rich_help_panel=options.OUTPUT)]
Width = Annotated[int, typer.Option(min=1, metavar="E", help="Hidden units of a gate.", rich_help_panel=TRAINING)]
Epochs = Annotated[int, typer.Option(min=1, metavar="N", help="Passes over the tokens.", rich_help_panel=TRAINING)]
Batch = Annotated[int, typer.Option(min=1, metavar="N", help="Tokens in a step.", rich_help_panel=TRAINING)]
Rate = Annotated[float, typer.Option(min=0, metavar="X", help="Of AdamW, at its highest.", rich_help_panel=TRAINING)]
Decay = Annotated[float, typer.Option(min=0, metavar="X", help="Of the weights.", rich_help_panel=TRAINING)]


def train_gate(
    out: Out,
    text: Texts = None,
    model: options.Model = None,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    sequences: Sequences = 48,
    shortest: Shortest = 512,
    longest: Longest = 2048,
    width: Width = 256,
    epochs: Epochs = 8,
    batch: Batch = 512,
    rate: Rate = 3e-3,
    decay: Decay = 0.01,
    seed: Seed = 0,
    resume: Resume = False,
) -> None:
    """Train the gates with which auto, peak-attention and kvzip do without a repetition of the prompt.

    The model is frozen, and each layer is trained alone. What is captured lies in FOLDER/work until the end.
    """
    from headwise.gate.checkpoint import save_gates
    from headwise.measure.texts import read_documents
    from headwise.training.gate.one_layer import TrainingOptions
    from headwise.training.gate.run import GateRun, Recipe

    check_lengths(shortest, longest)
    training = TrainingOptions(width, epochs, batch, rate, decay, seed)
    texts = read_documents(text or ())
    loaded, tokenizer = load(model, parse_dtype(dtype), parse_device(device))
    recipe = Recipe(sequences, shortest, longest, training)
    run = GateRun(loaded, tokenizer, texts, recipe, out / "work", resume=resume)
    gates = run_with_progress(run.run, out / "work")
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
