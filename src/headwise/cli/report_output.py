"""Report output: a report -> the plain values that `--json` prints of it, and the rows that tables show of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from headwise.cli.tables import facts_table, plain_table

if TYPE_CHECKING:
    from headwise.policies import Policy
    from headwise.report.layer_report import LayerReport
    from headwise.report.report import Report

# Layers of a table of heads between two lines.
_SECTION = 5


def describe_report(policy: Policy, report: Report) -> dict[str, Any]:
    """What every command tells of a report, under the same names."""
    from headwise.policies.words import describe_policy

    return {
        "policy": describe_policy(policy),
        "memory": {
            "used_bytes": report.used_bytes,
            "allocated_bytes": report.allocated_bytes,
            "full_bytes": report.full_bytes,
            **report.remembered,
        },
        "kept_ratio": report.kept_ratio,
        "rules": report.rule_counts,
        "kernel": report.kernel,
    }


def describe_layers(report: Report) -> list[dict[str, Any]]:
    """Of every layer its heads; None where transformers' own cache is kept."""
    return [
        {"layer": index, "heads": None if layer.rules is None else _describe_heads(layer)}
        for index, layer in enumerate(report.layers)
    ]


def rungs_of(report: Report) -> tuple[str, ...]:
    """The rules that heads could have, by name."""
    return next((layer.rungs for layer in report.layers if layer.rungs), ())


def summary_table(report: Report) -> Table:
    """Of a prompt that was read: what is kept, what it takes, and which rules there are."""
    from headwise.units import format_bytes

    table = facts_table()
    table.add_row("policy", report.policy)
    table.add_row("prompt", f"{report.seen_tokens:,} tokens")
    table.add_row("kept", f"{report.kept_ratio:.1%} of all rows")
    table.add_row(
        "memory held", f"{format_bytes(report.allocated_bytes)} of {format_bytes(report.full_bytes)} for a full cache"
    )
    add_mended(table, report)
    add_rules(table, report)
    return table


def heads_table(report: Report) -> Table:
    """A row for every head: its rule, its kept tokens, and what every rule would have recovered."""
    rungs = rungs_of(report)
    table = plain_table("layer", "head", "rule", "kept")
    for index in range(len(rungs)) if is_chosen(report) else ():
        table.add_column(str(index + 1), justify="right", no_wrap=True)
    for column, justify in ((0, "right"), (1, "right"), (3, "right")):
        table.columns[column].justify = justify  # type: ignore[assignment]  # a literal in rich's types
    table.columns[2].overflow, table.columns[2].no_wrap = "ellipsis", True
    table.columns[3].no_wrap = True
    for number, layer in enumerate(report.layers):
        if layer.rules is None:
            table.add_row(str(number), "", Text("not compressed", style="dim"))
            continue
        for head in _describe_heads(layer):
            table.add_row(*_head_row(number, head, rungs, report.seen_tokens))
        if number % _SECTION == _SECTION - 1:
            table.add_section()
    return table


def is_chosen(report: Report) -> bool:
    """Whether heads have their rules by what these would have recovered."""
    return any(layer.recovered is not None for layer in report.layers)


def add_mended(table: Table, report: Report) -> None:
    """What LESS takes, and what refitted rows won; nothing without them."""
    from headwise.report.words import mended_words, remembered_words

    if report.remembered:
        table.add_row("remembered", remembered_words(report.memory_bytes, report.weight_bytes))
    if report.mean_error:
        table.add_row("outputs off by", mended_words(*report.mean_error))


def add_rules(table: Table, report: Report) -> None:
    """How many heads took which rule, and how well that was looked into."""
    total = sum(report.rule_counts.values())
    lines = [f"{count:>{len(str(total))}} {name}" for name, count in report.rule_counts.items()]
    if lines:
        table.add_row(f"rules of {total} heads", "\n".join(lines))
    rows = report.rows_by_format
    if rows:
        width = len(f"{max(rows.values()):,}")
        table.add_row("rows", "\n".join(f"{count:>{width},} {name}" for name, count in rows.items()))
    stock = sum(kept is None for kept in report.kept_tokens)
    if stock:
        table.add_row("not compressed", f"{stock} of {len(report.layers)} layers, which keep transformers' own cache")
    if report.sampled is not None and report.sampled < 1:
        table.add_row("profile", f"a sample: {report.sampled:.1%} of the prompt's query rows")


def saved_words(report: Report) -> Text:
    """What is held less than a full cache would."""
    from headwise.units import format_bytes

    if not report.full_bytes:
        return Text("nothing to save")
    share = report.saved_bytes / report.full_bytes
    style = "bold green" if share > 0 else "yellow"
    return Text(f"{format_bytes(report.saved_bytes)} ({share:.1%})", style=style)


def _describe_heads(layer: LayerReport) -> list[dict[str, Any]]:
    """Of every head its rule, its kept tokens, and the recovered mass of every rung, or None."""
    assert layer.rules is not None and layer.kept_tokens is not None
    return [
        {
            "head": head,
            "rule": str(rule),
            "kept_tokens": int(layer.kept_tokens[0, head]),
            "recovered": None if layer.recovered is None else layer.recovered[:, 0, head].tolist(),
        }
        for head, rule in enumerate(layer.rules[0])
    ]


def _head_row(layer: int, head: dict[str, Any], rungs: tuple[str, ...], seen: int) -> list[Text | str]:
    taken = rungs.index(head["rule"])
    kept = head["kept_tokens"]
    cells: list[Text | str] = [
        str(layer) if head["head"] == 0 else "",
        str(head["head"]),
        head["rule"],
        f"{kept:,} ({kept / seen:.0%})",
    ]
    for index, mass in enumerate(head["recovered"] or ()):
        # Three digits could round what just missed the target up to it.
        text = f"{int(mass * 1000) / 1000:.3f}"
        cells.append(Text(f"*{text}", style="bold green") if index == taken else Text(text, style="dim"))
    return cells
