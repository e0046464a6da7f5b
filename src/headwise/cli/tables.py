"""Tables: what a command found -> lines for people, on standard error unless they are the result itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from headwise.cli.generate import Outcome
    from headwise.cli.running import Run
    from headwise.report.report import Report

# A pipe has no width; this one holds the longest rule names.
_PIPE_WIDTH = 120


def output() -> Console:
    """Standard output, for results."""
    return _console(error=False)


def heading(title: str) -> None:
    """A line across standard error with a title in it."""
    _console(error=True).rule(Text(title, style="bold"), align="left", style="dim")


def message(text: str) -> None:
    """Text as it is, to standard error."""
    typer.echo(text, nl=False, err=True)


def plain_table(*columns: str) -> Table:
    """A table without frames; its columns are named."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column)
    return table


def show_costs(outcome: Outcome) -> None:
    """What `generate` cost, and what a full cache would have."""
    from headwise.units import format_bytes

    report, seconds, memory = outcome.report, outcome.seconds, outcome.full_memory
    table = Table(
        box=box.SIMPLE_HEAD if memory else None, show_header=bool(memory), pad_edge=False, padding=(0, 2, 0, 0)
    )
    table.add_column(style="dim", no_wrap=True)
    table.add_column(report.policy)
    if memory:
        table.add_column("full cache")

    ours = [(len(outcome.run.token_ids), report.allocated_bytes, report.used_bytes, _times(seconds, outcome.run))]
    if memory and outcome.full is not None:
        full = {"prefill": outcome.full.first, "decode": outcome.full.rest}
        times = _times(full, outcome.full)
        ours.append((len(outcome.full.token_ids), memory["allocated_bytes"], memory["used_bytes"], times))
    else:
        table.add_row("policy", report.policy)
    new, held, used, times_taken = zip(*ours, strict=True)
    table.add_row("tokens", *(f"{outcome.prompt_tokens:,} prompt + {count:,} new" for count in new))
    table.add_row("kept", f"{report.kept_ratio:.1%} of all rows", *(["100%"] if memory else []))
    table.add_row("memory held", *map(format_bytes, held))
    table.add_row("memory used", *map(format_bytes, used))
    add_memory(table, report)
    table.add_row("full cache", f"{format_bytes(report.full_bytes)} for the same tokens")
    table.add_row("saved", _saved(report))
    add_rules(table, report)
    table.add_row("seconds", *times_taken)
    console = _console(error=True)
    console.print()
    console.print(table)


def add_memory(table: Table, report: Report) -> None:
    """What LESS takes; nothing without it."""
    from headwise.report.report import describe_memory

    if report.remembered:
        table.add_row("remembered", describe_memory(report))


def add_rules(table: Table, report: Report) -> None:
    """How many heads took which rule, and how well that was looked into."""
    total = sum(report.rule_counts.values())
    lines = [f"{count:>{len(str(total))}} {name}" for name, count in report.rule_counts.items()]
    if lines:
        table.add_row(f"rules of {total} heads", "\n".join(lines))
    stock = sum(kept is None for kept in report.kept_tokens)
    if stock:
        table.add_row("not compressed", f"{stock} of {len(report.layers)} layers, which keep transformers' own cache")
    if report.sampled is not None and report.sampled < 1:
        table.add_row("profile", f"a sample: {report.sampled:.1%} of the prompt's query rows")


def _saved(report: Report) -> Text:
    from headwise.units import format_bytes

    if not report.full_bytes:
        return Text("nothing to save")
    share = report.saved_bytes / report.full_bytes
    style = "bold green" if share > 0 else "yellow"
    return Text(f"{format_bytes(report.saved_bytes)} ({share:.1%})", style=style)


def _times(seconds: dict[str, float], run: Run) -> str:
    width = max(len(f"{taken:.2f}") for taken in seconds.values())
    lines = [f"{taken:{width}.2f} {name}" for name, taken in seconds.items()]
    # The first token comes out of the prefill; decode is the last line.
    made = len(run.token_ids) - 1
    return "\n".join(lines) + (f" ({made / run.rest:.1f} tokens/s)" if made and run.rest else "")


def _console(*, error: bool) -> Console:
    console = Console(stderr=error, highlight=False)
    return console if console.is_terminal else Console(stderr=error, highlight=False, width=_PIPE_WIDTH)
