"""Compare: policies, budgets and tasks -> one run of all of them, and a page with its curves, maps and tables."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from headwise.cli import options
from headwise.cli.eval_options import (
    WORKLOAD,
    Context,
    NewTokens,
    RunOptions,
    Seed,
    Steps,
    Texts,
    UndoMarks,
    with_run_options,
)
from headwise.cli.eval_run import present, run_tasks
from headwise.cli.tables import message

_POLICIES = "streamingllm,h2o,snapkv,adakv,kvzip,fastgen"
_BUDGETS = "0.5,0.25,0.1"
_TASKS = "fidelity,recall"


PolicySpecs = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC,...",
        help="Names, each run at every budget, or specs that state a size, such as fastgen:recovery=0.95. "
        f"{_POLICIES} unless given here or as --policy.",
        rich_help_panel=options.POLICY,
    ),
]
Budgets = Annotated[
    str,
    typer.Option(
        metavar="SIZE,...",
        help="Shares of the context such as 0.25, tokens per KV head such as 512, or bytes such as 64MiB.",
        rich_help_panel=options.POLICY,
    ),
]
Tasks = Annotated[
    str,
    typer.Option(
        metavar="NAME,...",
        help="fidelity, generation, recall, synthetic, or a kind of it such as multi-key; recall-aware or "
        "recall-agnostic for one query mode. Speed is always measured.",
        rich_help_panel=WORKLOAD,
    ),
]
Prompts = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Prompts of generation, in JSON lines.", rich_help_panel=options.INPUT),
]
Items = Annotated[
    int, typer.Option(metavar="N", help="Passages, questions and prompts, of every task.", rich_help_panel=WORKLOAD)
]
Rounds = Annotated[int, typer.Option(metavar="N", help="Rounds that speed is timed in.", rich_help_panel=WORKLOAD)]


@dataclass(frozen=True)
class Comparison:
    """What is to be compared: tasks, and words for `make_contenders`."""

    tasks: list[Any]
    policies: list[str] | None
    budgets: list[str]


def _compare(asked: Comparison, given: RunOptions) -> None:
    from headwise.eval.budgets import split_specs
    from headwise.eval.compare.page import write_comparison
    from headwise.eval.contenders import make_contenders
    from headwise.report.picture import check_matplotlib

    check_matplotlib()
    specs = [*(asked.policies or []), *(given.policy or [])] or split_specs(_POLICIES)
    contenders = make_contenders(specs, not given.no_random, given.seed, asked.budgets)
    results = run_tasks(asked.tasks, contenders, given)
    page, *_ = write_comparison(results.to_dict(), given.out)
    message(f"page: {page}\n")
    present(results, given)


@with_run_options(_compare)
def compare(
    policies: PolicySpecs = None,
    budgets: Budgets = _BUDGETS,
    tasks: Tasks = _TASKS,
    text: Texts = None,
    prompts: Prompts = None,
    context: Context = 2048,
    steps: Steps = 128,
    items: Items = 8,
    new_tokens: NewTokens = 24,
    rounds: Rounds = 3,
    undo_marks: UndoMarks = False,
    seed: Seed = 0,
) -> Comparison:
    """Compare policies at several sizes: quality against bytes and speed, on one page.

    The page, compare.html, needs no network; its pictures lie beside it.
    """
    from headwise.eval.budgets import split_specs
    from headwise.eval.compare.tasks import Workload, make_tasks

    workload = Workload(
        files=tuple(text or ()),
        context=context,
        steps=steps,
        items=items,
        new_tokens=new_tokens,
        rounds=rounds,
        prompts=prompts,
        seed=seed,
        undo_marks=undo_marks,
    )
    made = make_tasks([name.strip() for name in tasks.split(",")], workload)
    return Comparison(made, None if policies is None else split_specs(policies), budgets.split(","))
