"""Training: options that the commands that train have in common -> a run with a bar, which can be gone on with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from headwise.cli import options
from headwise.cli.progress import progress
from headwise.cli.tables import message
from headwise.errors import ConfigurationError

if TYPE_CHECKING:
    from headwise.training.run import Tell

TRAINING = "Training"

Result = TypeVar("Result")

Texts = Annotated[
    list[Path] | None,
    typer.Option(
        "--text",
        metavar="FILE",
        help="UTF-8 text to learn from; may be repeated. Default: Python's manual of topics.",
        rich_help_panel=options.INPUT,
    ),
]
Sequences = Annotated[
    int, typer.Option(min=10, metavar="N", help="Passages; every tenth only checks.", rich_help_panel=TRAINING)
]
Shortest = Annotated[
    int, typer.Option(min=64, metavar="N", help="Tokens of the shortest prompt.", rich_help_panel=TRAINING)
]
Longest = Annotated[
    int, typer.Option(min=64, metavar="N", help="Tokens of the longest prompt.", rich_help_panel=TRAINING)
]
Seed = Annotated[int, typer.Option(min=0, metavar="N", help="Of passages and weights.", rich_help_panel=TRAINING)]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with an interrupted run.", rich_help_panel=options.OUTPUT)
]


def check_lengths(shortest: int, longest: int) -> None:
    """Refuse lengths in the wrong order.

    Raises:
        ConfigurationError: with both.
    """
    if shortest > longest:
        raise ConfigurationError(f"the shortest prompt cannot be longer than the longest: {shortest} and {longest}")


def run_with_progress(run: Callable[[Tell], Result], work: Path) -> Result:
    """Run it with a bar; an interruption says how to go on.

    Args:
        run: tells how far it is.
        work: where the run keeps what is finished.
    """
    try:
        with progress() as tell:
            return run(lambda what, done, total: tell(done, total, what))
    except KeyboardInterrupt:
        message(f"go on with --resume; what is finished lies in {work}\n")
        raise
