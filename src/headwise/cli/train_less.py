"""Train-less: a model, policies and texts -> a folder with kernels of LESS, with a bar while they are trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

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

_POLICIES = ("fastgen:recovery=0.5", "h2o:heavy=0.025,recent=0.025", "streamingllm:window=0.05,within=true")


Out = Annotated[Path, typer.Option(metavar="FOLDER", help="Where the kernels go.", rich_help_panel=options.OUTPUT)]
PolicySpecs = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SPEC",
        help=f"What evicts; may be repeated, sequences take turns. Default: {', '.join(_POLICIES)}.",
        rich_help_panel=options.POLICY,
    ),
]
Start = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Kernels to start from, not random ones.", rich_help_panel=TRAINING),
]
Rows = Annotated[int, typer.Option(min=16, metavar="N", help="Tokens after each prompt.", rich_help_panel=TRAINING)]
Features = Annotated[
    int, typer.Option(min=1, metavar="R", help="Features: the size of the state.", rich_help_panel=TRAINING)
]
Width = Annotated[int, typer.Option(min=1, metavar="E", help="Hidden width of the kernels.", rich_help_panel=TRAINING)]
Epochs = Annotated[
    int,
    typer.Option(
        min=0, metavar="N", help="Passes over the sequences; 0 leaves this part out.", rich_help_panel=TRAINING
    ),
]
Batch = Annotated[int, typer.Option(min=1, metavar="N", help="Sequences in a step.", rich_help_panel=TRAINING)]
Rate = Annotated[float, typer.Option(min=0, metavar="X", help="Of Adam, at the start.", rich_help_panel=TRAINING)]
HalveEvery = Annotated[
    int, typer.Option(min=1, metavar="N", help="Epochs after which it is halved.", rich_help_panel=TRAINING)
]
TogetherEpochs = Annotated[
    int,
    typer.Option(
        min=0, metavar="N", help="Then, passes in which all layers are trained at once.", rich_help_panel=TRAINING
    ),
]
TogetherRate = Annotated[
    float, typer.Option(min=0, metavar="X", help="Of Adam in those, at the start.", rich_help_panel=TRAINING)
]
StoreLimit = Annotated[
    str, typer.Option(metavar="SIZE", help="What is captured may take on disk.", rich_help_panel=TRAINING)
]


def train_less(
    out: Out,
    policy: PolicySpecs = None,
    text: Texts = None,
    model: options.Model = None,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    sequences: Sequences = 160,
    start: Start = None,
    shortest: Shortest = 256,
    longest: Longest = 2048,
    rows: Rows = 192,
    features: Features = 8,
    width: Width = 64,
    epochs: Epochs = 8,
    batch: Batch = 2,
    rate: Rate = 3e-3,
    halve_every: HalveEvery = 2,
    together: TogetherEpochs = 0,
    together_rate: TogetherRate = 1e-3,
    seed: Seed = 0,
    store_limit: StoreLimit = "16GiB",
    resume: Resume = False,
) -> None:
    """Train the kernels of LESS, with which a cache remembers what its policy evicts.

    The model is frozen. Each layer is trained alone by the error of its output; then, with --together, all at once by
    what the model says. What is captured lies in FOLDER/work until the end.
    """
    from headwise.less.checkpoint import load_kernels, save_kernels
    from headwise.measure.texts import read_documents
    from headwise.policies.words import parse_policy
    from headwise.training.less.jointly import JointOptions
    from headwise.training.less.one_layer import TrainingOptions
    from headwise.training.less.run import Recipe, TrainingRun
    from headwise.units import parse_bytes

    check_lengths(shortest, longest)
    training = TrainingOptions(features, width, epochs, batch, rate, halve_every, seed)
    jointly = JointOptions(together, rate=together_rate, seed=seed)
    recipe = Recipe(sequences, shortest, longest, rows, parse_bytes(store_limit), training, jointly)
    policies = [(spec, parse_policy(spec)) for spec in policy or _POLICIES]
    texts = read_documents(text or ())
    earlier = None if start is None else load_kernels(start)
    where = parse_dtype(dtype), parse_device(device)
    loaded, tokenizer = load(model, *where)
    run = TrainingRun(loaded, tokenizer, policies, texts, recipe, out / "work", resume=resume, start=earlier)
    kernels = run_with_progress(run.run, out / "work")
    save_kernels(kernels, out)
    run.finish()
    _show(kernels.about["layers"])
    if "divergence" in kernels.about:
        _show_divergence(kernels.about["divergence"])
    message(f"kernels: {out}\n")


def _show(layers: dict[str, dict[str, float]]) -> None:
    table = plain_table("layer", "error without", "with LESS", "share left")
    for index, error in layers.items():
        table.add_row(index, f"{error['without']:.4f}", f"{error['with']:.4f}", f"{error['share']:.0%}")
    output().print(table)


def _show_divergence(figures: dict[str, Any]) -> None:
    table = plain_table("after", "KL to the full cache, nats per token", "share left")
    table.add_row("no memory", f"{figures['without']:.4f}", "")
    for epoch, found in enumerate(figures["with"]):
        name = "each layer alone" if epoch == 0 else f"epoch {epoch} together"
        table.add_row(name, f"{found:.4f}", f"{found / figures['without']:.0%}")
    output().print(table)
