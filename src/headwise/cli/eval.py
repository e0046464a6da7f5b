"""Eval: a kind of evaluation and policies -> what compression costs, as a table, JSON and a folder of records."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headwise.cli.eval_generation import generation
from headwise.cli.eval_options import RunOptions, Seed, Texts, UndoMarks, parse_first_token, with_run_options
from headwise.cli.eval_run import carry_out, present
from headwise.errors import ConfigurationError

if TYPE_CHECKING:
    from headwise.eval.task import Query

_WORKLOAD = "Workload"
_BOTH = "both"
_ALL = "all"

evaluations = typer.Typer(
    name="eval", help="Measure what compression costs: fidelity, recall, made-up tasks, generation."
)

QueryMode = Annotated[
    str,
    typer.Option(
        "--query",
        metavar="NAME",
        help="aware: the question is there while compressing; agnostic: it comes after; or both.",
        rich_help_panel=_WORKLOAD,
    ),
]


def evaluate(tasks: Sequence[Any], given: RunOptions) -> None:
    """Run the tasks and show what came out; leaves with 130 when interrupted."""
    from headwise.eval.lineup import line_up

    lineup = line_up(given.policy or ["fastgen"], not given.no_random, given.seed)
    present(carry_out(tasks, lineup, given), given)


evaluation = with_run_options(evaluate)
evaluations.command()(evaluation(generation))


@evaluations.command()
@evaluation
def fidelity(
    text: Texts = None,
    context: Annotated[
        int, typer.Option(metavar="N", help="Tokens that are read and compressed.", rich_help_panel=_WORKLOAD)
    ] = 2048,
    steps: Annotated[
        int, typer.Option(metavar="N", help="Tokens that are then fed one by one.", rich_help_panel=_WORKLOAD)
    ] = 128,
    passages: Annotated[
        int, typer.Option(metavar="N", help="At equal steps through every file.", rich_help_panel=_WORKLOAD)
    ] = 8,
    first_token: Annotated[
        str | None,
        typer.Option(
            metavar="ID",
            help="Token to put before every passage, or bos for the tokenizer's.",
            rich_help_panel=_WORKLOAD,
        ),
    ] = None,
    undo_marks: UndoMarks = False,
) -> list[Any]:
    """Continue real text on the compressed cache: how far do predictions move from the full cache's?"""
    from headwise.eval.fidelity import Fidelity

    first = parse_first_token(first_token)
    return [Fidelity(tuple(text or ()), context, steps, passages, first, undo_marks)]


@evaluations.command()
@evaluation
def recall(
    text: Texts = None,
    context: Annotated[int, typer.Option(metavar="N", help="Tokens of real text.", rich_help_panel=_WORKLOAD)] = 2048,
    facts: Annotated[
        int, typer.Option(metavar="N", help="Facts in every text; one is asked for.", rich_help_panel=_WORKLOAD)
    ] = 4,
    items: Annotated[int, typer.Option(metavar="N", help="Questions.", rich_help_panel=_WORKLOAD)] = 16,
    new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Length of an answer at the most.", rich_help_panel=_WORKLOAD)
    ] = 24,
    query: QueryMode = _BOTH,
    undo_marks: UndoMarks = False,
    seed: Seed = 0,
) -> list[Any]:
    """Ask for facts that were planted in real text."""
    from headwise.eval.recall import Recall

    files = tuple(text or ())
    return [Recall(mode, context, items, new_tokens, seed, files, facts, undo_marks) for mode in _queries(query)]


@evaluations.command()
@evaluation
def synthetic(
    kind: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help="single-needle, multi-key, multi-value, variables, common-words, frequent-words, or all.",
            rich_help_panel=_WORKLOAD,
        ),
    ] = _ALL,
    context: Annotated[
        int, typer.Option(metavar="N", help="Tokens of made-up text.", rich_help_panel=_WORKLOAD)
    ] = 2048,
    needles: Annotated[
        int, typer.Option(metavar="N", help="Codes, where there are several.", rich_help_panel=_WORKLOAD)
    ] = 4,
    hops: Annotated[
        int, typer.Option(metavar="N", help="Times a variable is handed on.", rich_help_panel=_WORKLOAD)
    ] = 4,
    items: Annotated[int, typer.Option(metavar="N", help="Questions of every kind.", rich_help_panel=_WORKLOAD)] = 8,
    new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Of an answer beyond what is expected.", rich_help_panel=_WORKLOAD)
    ] = 24,
    query: QueryMode = _BOTH,
    seed: Seed = 0,
) -> list[Any]:
    """Ask about made-up text, after the tasks of RULER; needs no data."""
    from headwise.eval.synthetic import KINDS, Synthetic

    kinds = list(KINDS) if kind == _ALL else [name.strip() for name in kind.split(",")]
    return [
        Synthetic(mode, context, items, new_tokens, seed, name, needles, hops)
        for name, mode in product(kinds, _queries(query))
    ]


def _queries(name: str) -> list[Query]:
    modes: dict[str, list[Query]] = {_BOTH: ["agnostic", "aware"], "agnostic": ["agnostic"], "aware": ["aware"]}
    if name not in modes:
        raise ConfigurationError(f"--query must be one of {', '.join(modes)}, got {name!r}")
    return modes[name]
