"""Compare: policies, budgets and tasks -> one run of all of them, and a page with its curves, maps and tables."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
from headwise.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from headwise.eval.contenders import Contender

_POLICIES = "streamingllm,h2o,snapkv,adakv,kvzip,fastgen"
_BUDGETS = "0.5,0.25,0.1"
_TASKS = "fidelity,recall"

# The page that shows heads; tokens of its answer, and how often the cache is looked at.
_HEADS, _SHOWN_TOKENS, _MOMENTS = "heads.html", 32, 5


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


Heads = Annotated[
    bool,
    typer.Option(
        help="Show too which tokens every head holds of the first passage, under the first two policies at their "
        "first sizes: heads.html, as `headwise inspect` makes it.",
        rich_help_panel=options.OUTPUT,
    ),
]


@dataclass(frozen=True)
class Comparison:
    """What is to be compared: tasks, words for `make_contenders`, and whether heads are to be shown."""

    tasks: list[Any]
    policies: list[str] | None
    budgets: list[str]
    heads: bool = False


def _compare(asked: Comparison, given: RunOptions) -> None:
    from headwise.eval.budgets import split_specs
    from headwise.eval.compare.page import write_comparison
    from headwise.eval.contenders import make_contenders
    from headwise.report.picture import check_matplotlib

    check_matplotlib()
    if asked.heads:
        _check_heads(given)
    specs = [*(asked.policies or []), *(given.policy or [])] or split_specs(_POLICIES)
    contenders = make_contenders(specs, not given.no_random, given.seed, asked.budgets)
    results = run_tasks(asked.tasks, contenders, given)
    links = {}
    if asked.heads and not results.interrupted:
        links["What every head holds"] = _show_heads(asked, contenders, given)
    page, *_ = write_comparison(results.to_dict(), given.out, links)
    message(f"page: {page}\n")
    present(results, given)


def _check_heads(given: RunOptions) -> None:
    """Refuse to begin what could not be shown at the end."""
    if given.ray or given.ray_address is not None or given.server is not None:
        raise ConfigurationError("--heads needs the model in this process; it goes with neither --ray nor --server")


def _show_heads(asked: Comparison, contenders: Sequence[Contender], given: RunOptions) -> str:
    """Write the page, and return its name."""
    from headwise.eval.contenders import PolicyContender
    from headwise.eval.passages import Passages
    from headwise.hosts.transformers.cache import HeadwiseCache
    from headwise.policies import Full
    from headwise.viewer.page_file import write_page
    from headwise.viewer.recording import record

    source = given.source()
    subject = source.load()
    # There is always one: that of speed.
    task = next(task for task in asked.tasks if isinstance(task, Passages))
    ids = task.ids(subject, task.items(subject.tokenizer)[0])[:, : task.context]
    policies = [c for c in contenders if isinstance(c, PolicyContender) and not isinstance(c.policy, Full)]
    # Of each policy its first size; the last that is written stays.
    shown = {contender.series: contender for contender in reversed(policies)}
    recordings = []
    for contender in [each for each in policies if shown[each.series] is each][:2]:

        def make(contender: PolicyContender = contender) -> HeadwiseCache:
            own = {"budget": contender.budget, **subject.options}
            return HeadwiseCache(subject.model, contender.policy, tokenizer=subject.tokenizer, **own)

        message(f"heads under {contender.label} ...\n")
        recordings.append(record(subject.model, subject.tokenizer, ids, make, _SHOWN_TOKENS, _MOMENTS))
    write_page(recordings, source.name, given.out / _HEADS)
    return _HEADS


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
    heads: Heads = False,
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
    return Comparison(made, None if policies is None else split_specs(policies), budgets.split(","), heads)
