"""Eval steering: tasks, heads and policies -> whether a model does what is marked, told so in every way."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headwise.cli.eval_options import WORKLOAD, RunOptions, Seed, Texts
from headwise.cli.eval_run import present, run_tasks
from headwise.errors import ConfigurationError

if TYPE_CHECKING:
    from headwise.eval.task import Task
    from headwise.steer.heads import Heads

_STEERING = "Steering"
_RECALL = "recall"
_ALL = "nothing,asterisks,quotes,examples,heads,every head,random heads"

Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        metavar="NAME|FILE",
        help="A kind of contrasts that is made, or a file of them; json, pronouns or rules: a marked instruction that "
        "what is written obeys or not; recall: a marked fact in real text. May be repeated; occupation, city, language "
        "and instrument unless given.",
        rich_help_panel=WORKLOAD,
    ),
]
Items = Annotated[int, typer.Option(min=1, metavar="N", help="Prompts of every task.", rich_help_panel=WORKLOAD)]
HeadFiles = Annotated[
    list[Path] | None,
    typer.Option("--heads", metavar="FILE", help="Of heads to steer; may be repeated.", rich_help_panel=_STEERING),
]
Alpha = Annotated[
    float, typer.Option(metavar="X", help="What other attention is multiplied by.", rich_help_panel=_STEERING)
]
Ways = Annotated[str, typer.Option(metavar="NAME,...", help="In which the model is told.", rich_help_panel=_STEERING)]
Draws = Annotated[
    int,
    typer.Option(min=1, metavar="N", help="Of random heads, as many as in the first file.", rich_help_panel=_STEERING),
]
RecallContext = Annotated[
    int, typer.Option(min=1, metavar="N", help="Tokens of the text of recall.", rich_help_panel=WORKLOAD)
]


@dataclass(frozen=True)
class Asked:
    """What is to be measured.

    Attributes:
        heads: by the names of their files.
    """

    tasks: list[Task]
    heads: dict[str, Heads]
    alpha: float
    ways: tuple[str, ...]
    draws: int


def evaluate(asked: Asked, given: RunOptions) -> None:
    """Run the tasks and show what came out; leaves with 130 when interrupted."""
    from headwise.eval.contenders import PolicyContender, make_contenders
    from headwise.eval.steering.treatments import make_treatments

    made = make_contenders(given.policy or ["full"], random=False)
    policies = {each.label: each.policy for each in made if isinstance(each, PolicyContender)}
    if given.policy and "full" not in given.policy:
        del policies["full"]
    rows = make_treatments(policies, asked.heads, asked.alpha, asked.ways, asked.draws)  # type: ignore[arg-type]  # checked
    present(run_tasks(asked.tasks, rows, given), given)


def steering(
    task: Tasks = None,
    items: Items = 100,
    heads: HeadFiles = None,
    alpha: Alpha = 0.01,
    ways: Ways = _ALL,
    draws: Draws = 3,
    context: RecallContext = 1000,
    text: Texts = None,
    seed: Seed = 0,
) -> Asked:
    """Mark a fact beside another, or an instruction: does the model do as is marked, told so in every way?"""
    from headwise.steer.heads import read_heads

    named = [way.strip() for way in ways.split(",")]
    unknown = [way for way in named if way not in _ALL.split(",")]
    if unknown:
        raise ConfigurationError(f"there is no way {unknown[0]!r}; there are {_ALL.replace(',', ', ')}")
    if not heads:
        if ways != _ALL and any(way in ("heads", "random heads") for way in named):
            raise ConfigurationError("--heads says which heads are steered; `headwise profile-heads` finds them")
        named = [way for way in named if way not in ("heads", "random heads")]
    files = {path.name.removesuffix(".json"): read_heads(path) for path in heads or ()}
    if len(files) < len(heads or ()):
        raise ConfigurationError("two files of heads have the same name")
    kinds = task or ["occupation", "city", "language", "instrument"]
    if _RECALL in kinds and "examples" in named:
        if ways != _ALL or len(kinds) > 1:
            raise ConfigurationError(f"{_RECALL} has no examples: leave that way out, or ask for it alone")
        named.remove("examples")
    tasks = [_task(kind, items, context, seed, text) for kind in kinds]
    return Asked(tasks, files, alpha, tuple(named), draws)


def _task(kind: str, items: int, context: int, seed: int, text: list[Path] | None) -> Task:
    from headwise.eval.steering.choice import Choice
    from headwise.eval.steering.instructed import Instructed
    from headwise.eval.steering.marked_recall import MarkedRecall
    from headwise.measure.instructions import INSTRUCTIONS

    if kind == _RECALL:
        return MarkedRecall("agnostic", context, items, seed=seed, files=tuple(text or ()))
    return Instructed(kind, items, seed) if kind in INSTRUCTIONS else Choice(kind, items, seed)
