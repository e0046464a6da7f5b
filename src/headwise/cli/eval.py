"""Eval: a kind of evaluation and policies -> what compression costs, as a table, JSON and a folder of records."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headwise.cli.eval_generation import generation
from headwise.cli.eval_options import (
    WORKLOAD,
    Context,
    NewTokens,
    RunOptions,
    Seed,
    Steps,
    Texts,
    UndoMarks,
    parse_first_token,
    with_run_options,
)
from headwise.cli.eval_run import present, run_tasks
from headwise.cli.eval_steering import evaluate as evaluate_steering
from headwise.cli.eval_steering import steering
from headwise.errors import ConfigurationError

if TYPE_CHECKING:
    from headwise.eval.task import Query

_BOTH = "both"
_ALL = "all"

evaluations = typer.Typer(
    name="eval", help="Measure what compression costs: fidelity, recall, made-up tasks, generation, long texts, turns."
)

QueryMode = Annotated[
    str,
    typer.Option(
        "--query",
        metavar="NAME",
        help="aware: the question is there while compressing; agnostic: it comes after; or both.",
        rich_help_panel=WORKLOAD,
    ),
]
Passages = Annotated[
    int, typer.Option(metavar="N", help="At equal steps through every file.", rich_help_panel=WORKLOAD)
]
Last = Annotated[int, typer.Option(metavar="N", help="Of these, whose predictions count.", rich_help_panel=WORKLOAD)]
FirstToken = Annotated[
    str | None,
    typer.Option(
        metavar="ID",
        help="Token to put before every passage, or bos for the tokenizer's.",
        rich_help_panel=WORKLOAD,
    ),
]
RealContext = Annotated[int, typer.Option(metavar="N", help="Tokens of real text.", rich_help_panel=WORKLOAD)]
Facts = Annotated[
    int, typer.Option(metavar="N", help="Facts in every text; one is asked for.", rich_help_panel=WORKLOAD)
]
Questions = Annotated[int, typer.Option(metavar="N", help="Questions.", rich_help_panel=WORKLOAD)]
Kinds = Annotated[
    str,
    typer.Option(
        metavar="NAME,...",
        help="single-needle, multi-key, multi-value, variables, common-words, frequent-words, or all.",
        rich_help_panel=WORKLOAD,
    ),
]
TurnKind = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="facts: every turn tells another, one is asked for; tally: every turn tells a new count, the last is.",
        rich_help_panel=WORKLOAD,
    ),
]
TurnCount = Annotated[int, typer.Option(metavar="N", help="In which something is told.", rich_help_panel=WORKLOAD)]
MadeUpContext = Annotated[int, typer.Option(metavar="N", help="Tokens of made-up text.", rich_help_panel=WORKLOAD)]
Needles = Annotated[int, typer.Option(metavar="N", help="Codes, where there are several.", rich_help_panel=WORKLOAD)]
Hops = Annotated[int, typer.Option(metavar="N", help="Times a variable is handed on.", rich_help_panel=WORKLOAD)]
QuestionsPerKind = Annotated[int, typer.Option(metavar="N", help="Questions of every kind.", rich_help_panel=WORKLOAD)]
MoreNewTokens = Annotated[
    int, typer.Option(metavar="N", help="Of an answer beyond what is expected.", rich_help_panel=WORKLOAD)
]


def evaluate(tasks: Sequence[Any], given: RunOptions) -> None:
    """Run the tasks and show what came out; leaves with 130 when interrupted."""
    from headwise.eval.contenders import make_contenders

    contenders = make_contenders(given.policy or ["fastgen"], not given.no_random, given.seed)
    present(run_tasks(tasks, contenders, given), given)


evaluation = with_run_options(evaluate)
evaluations.command()(evaluation(generation))
evaluations.command()(with_run_options(evaluate_steering)(steering))


@evaluations.command()
@evaluation
def fidelity(
    text: Texts = None,
    context: Context = 2048,
    steps: Steps = 128,
    passages: Passages = 8,
    first_token: FirstToken = None,
    undo_marks: UndoMarks = False,
) -> list[Any]:
    """Continue real text on the compressed cache: how far do predictions move from the full cache's?"""
    from headwise.eval.fidelity import Fidelity

    first = parse_first_token(first_token)
    return [Fidelity(tuple(text or ()), context, steps, passages, first, undo_marks)]


@evaluations.command()
@evaluation
def long(
    text: Texts = None,
    context: Context = 1000,
    steps: Steps = 3000,
    last: Last = 1000,
    passages: Passages = 4,
    first_token: FirstToken = None,
    undo_marks: UndoMarks = False,
) -> list[Any]:
    """Feed a long text behind a prompt: how far are predictions off at its end, and was the budget held?"""
    from headwise.eval.long import Long

    first = parse_first_token(first_token)
    return [Long(tuple(text or ()), context, steps, passages, first, undo_marks, last)]


@evaluations.command()
@evaluation
def recall(
    text: Texts = None,
    context: RealContext = 2048,
    facts: Facts = 4,
    items: Questions = 16,
    new_tokens: NewTokens = 24,
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
    kind: Kinds = _ALL,
    context: MadeUpContext = 2048,
    needles: Needles = 4,
    hops: Hops = 4,
    items: QuestionsPerKind = 8,
    new_tokens: MoreNewTokens = 24,
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


@evaluations.command()
@evaluation
def turns(
    text: Texts = None,
    kind: TurnKind = "facts",
    context: RealContext = 6000,
    turns: TurnCount = 8,
    items: Questions = 16,
    new_tokens: NewTokens = 24,
    undo_marks: UndoMarks = False,
    seed: Seed = 0,
) -> list[Any]:
    """Tell something in every turn of a chat, and ask for it in the last."""
    from headwise.eval.turns import Turns

    return [Turns(kind, context, turns, items, new_tokens, seed, tuple(text or ()), undo_marks)]


def _queries(name: str) -> list[Query]:
    modes: dict[str, list[Query]] = {_BOTH: ["agnostic", "aware"], "agnostic": ["agnostic"], "aware": ["aware"]}
    if name not in modes:
        raise ConfigurationError(f"--query must be one of {', '.join(modes)}, got {name!r}")
    return modes[name]
