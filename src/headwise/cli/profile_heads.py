"""Profile-heads: a model and tasks -> a file of the heads to steer, found by steering each of them alone."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated

import typer

from headwise.cli import options
from headwise.cli.loading import load, parse_device, parse_dtype
from headwise.cli.tables import message, output, plain_table
from headwise.cli.training import run_with_progress
from headwise.errors import ConfigurationError

_PROFILE = "Profile"
# Of the layers, as many are looked at closely: one in so many.
_COARSE = 3

Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        metavar="NAME|FILE",
        help="A kind of contrasts that is made (occupation, city, language, instrument, hard-occupation and so on; "
        "json, pronouns, rules), or a file with one JSON object in a line: text, spans, wanted, unwanted, and chat, if "
        "the text is to be asked in a chat; may be repeated.",
        rich_help_panel=options.INPUT,
    ),
]
Out = Annotated[
    Path,
    typer.Option(metavar="FILE", help="Where the heads go; scores go beside it.", rich_help_panel=options.OUTPUT),
]
Samples = Annotated[int, typer.Option(min=1, metavar="N", help="Prompts of every task.", rich_help_panel=_PROFILE)]
Heads = Annotated[int, typer.Option(min=1, metavar="N", help="As many heads at the most.", rich_help_panel=_PROFILE)]
Keep = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="K", help="Instead of that, those among the best K for every task.", rich_help_panel=_PROFILE
    ),
]
Layers = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Look at the heads of so many of the best layers, which are found first. A third unless given.",
        rich_help_panel=_PROFILE,
    ),
]
Alpha = Annotated[
    float, typer.Option(metavar="X", help="What other attention is multiplied by.", rich_help_panel=_PROFILE)
]
Seed = Annotated[int, typer.Option(min=0, metavar="N", help="Of the prompts.", rich_help_panel=_PROFILE)]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with an interrupted run.", rich_help_panel=options.OUTPUT)
]


def profile_heads(
    out: Out,
    task: Tasks = None,
    samples: Samples = 40,
    heads: Heads = 20,
    keep: Keep = None,
    layers: Layers = None,
    alpha: Alpha = 0.01,
    seed: Seed = 0,
    resume: Resume = False,
    model: options.Model = None,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
) -> None:
    """Find the heads to steer (PASTA): each alone, by how much it draws the model to the answer that is marked.

    What is tried is written down as it is found, beside the heads, in FILE with `.scores.json` in place of `.json`.
    """
    from headwise.steer.heads import scores_file, write_heads
    from headwise.training.heads.run import HeadRun, Recipe, steerable_heads
    from headwise.training.heads.select import among_the_best, at_most, by_layer

    if not task:
        raise ConfigurationError("--task says what heads are profiled by; give one or more")
    loaded, tokenizer = load(model, parse_dtype(dtype), parse_device(device))
    found = steerable_heads(loaded)[0]
    coarse = max(1, len(found) // _COARSE) if layers is None else min(layers, len(found))
    recipe = Recipe(tuple(task), samples, alpha, None if coarse == len(found) else coarse, seed)
    work = scores_file(out)
    run = HeadRun(loaded, tokenizer, recipe, work, resume=resume)
    message(f"about {max(1, round(run.estimate() / 60))} min for {len(task)} x {samples} prompts\n")
    scores = list(run_with_progress(run.run, work).values())
    chosen, among = (among_the_best(scores, keep), keep) if keep is not None else at_most(scores, heads)
    write_heads(by_layer(chosen), out)
    table = plain_table("layer", "head", *(f"margin, {name}" for name in task))
    for layer, head in sorted(chosen, key=lambda at: -statistics.fmean(own[at[0]][at[1]] for own in scores)):
        table.add_row(str(layer), str(head), *(f"{own[layer][head]:.2f}" for own in scores))
    table.add_row("none steered", "", *(f"{run.plain[name]:.2f}" for name in task))
    output().print(table)
    message(f"heads: {out} ({len(chosen)}, among the best {among} for every task)\n")
