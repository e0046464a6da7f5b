"""Compare: policies, budgets and tasks -> one run of all of them, and a page with its curves, maps and tables."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from headwise.cli import options
from headwise.cli.eval_options import RunOptions, Seed, Texts, UndoMarks, with_run_options
from headwise.cli.eval_run import carry_out, present
from headwise.cli.tables import message

_WORKLOAD = "Workload"
_POLICIES = "streamingllm,h2o,snapkv,adakv,kvzip,fastgen"
_BUDGETS = "0.5,0.25,0.1"
_TASKS = "fidelity,recall"


@dataclass(frozen=True)
class Asked:
    """What is to be compared: tasks, and words for `line_up`."""

    tasks: list[Any]
    policies: list[str] | None
    budgets: list[str]


def _compare(asked: Asked, given: RunOptions) -> None:
    from headwise.eval.budgets import split_specs
    from headwise.eval.compare.page import write_comparison
    from headwise.eval.lineup import line_up
    from headwise.report.picture import check_matplotlib

    check_matplotlib()
    specs = [*(asked.policies or []), *(given.policy or [])] or split_specs(_POLICIES)
    lineup = line_up(specs, not given.no_random, given.seed, asked.budgets)
    results = carry_out(asked.tasks, lineup, given)
    page, *_ = write_comparison(results.to_dict(), given.out)
    message(f"page: {page}\n")
    present(results, given)


@with_run_options(_compare)
def compare(
    policies: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC,...",
            help="Names, each run at every budget, or specs that state a size, such as fastgen:recovery=0.95. "
            f"{_POLICIES} unless given here or as --policy.",
            rich_help_panel=options.POLICY,
        ),
    ] = None,
    budgets: Annotated[
        str,
        typer.Option(
            metavar="SIZE,...",
            help="Shares of the context such as 0.25, tokens per KV head such as 512, or bytes such as 64MiB.",
            rich_help_panel=options.POLICY,
        ),
    ] = _BUDGETS,
    tasks: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help="fidelity, generation, recall, synthetic, or a kind of it such as multi-key; recall-aware or "
            "recall-agnostic for one query mode. Speed is always measured.",
            rich_help_panel=_WORKLOAD,
        ),
    ] = _TASKS,
    text: Texts = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Prompts of generation, in JSON lines.", rich_help_panel=options.INPUT),
    ] = None,
    context: Annotated[
        int, typer.Option(metavar="N", help="Tokens that are read and compressed.", rich_help_panel=_WORKLOAD)
    ] = 2048,
    steps: Annotated[
        int, typer.Option(metavar="N", help="Tokens that are then fed one by one.", rich_help_panel=_WORKLOAD)
    ] = 128,
    items: Annotated[
        int,
        typer.Option(metavar="N", help="Passages, questions and prompts, of every task.", rich_help_panel=_WORKLOAD),
    ] = 8,
    new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Length of an answer at the most.", rich_help_panel=_WORKLOAD)
    ] = 24,
    rounds: Annotated[
        int, typer.Option(metavar="N", help="Rounds that speed is timed in.", rich_help_panel=_WORKLOAD)
    ] = 3,
    undo_marks: UndoMarks = False,
    seed: Seed = 0,
) -> Asked:
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
    return Asked(made, None if policies is None else split_specs(policies), budgets.split(","))
