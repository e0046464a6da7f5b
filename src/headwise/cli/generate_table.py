"""Generate table: what `generate` found -> what it cost, and what a full cache would have, on standard error."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headwise.cli.report_output import add_mended, add_rules, saved_words
from headwise.cli.tables import errors, facts_table

if TYPE_CHECKING:
    from headwise.cli.outcome import GenerateResult
    from headwise.cli.text_generation import Generated


def show_costs(result: GenerateResult) -> None:
    """Tokens, memory, rules and seconds; in two columns where a full cache was run too."""
    from headwise.units import format_bytes

    report, memory = result.report, result.full_memory
    table = facts_table(report.policy, "full cache") if memory else facts_table()
    columns = [
        (
            len(result.generated.token_ids),
            report.allocated_bytes,
            report.used_bytes,
            _times(result.seconds, result.generated),
        )
    ]
    if memory and result.full is not None:
        full = {"prefill": result.full.first, "decode": result.full.rest}
        times = _times(full, result.full)
        columns.append((len(result.full.token_ids), memory["allocated_bytes"], memory["used_bytes"], times))
    else:
        table.add_row("policy", report.policy)
    new, held, used, times_taken = zip(*columns, strict=True)
    table.add_row("tokens", *(f"{result.prompt_tokens:,} prompt + {count:,} new" for count in new))
    table.add_row("kept", f"{report.kept_ratio:.1%} of all rows", *(["100%"] if memory else []))
    table.add_row("memory held", *map(format_bytes, held))
    table.add_row("memory used", *map(format_bytes, used))
    add_mended(table, report)
    if report.steering is not None:
        table.add_row("steered", f"{report.steering.words}; {format_bytes(report.pinned_bytes)} of it marked")
    table.add_row("full cache", f"{format_bytes(report.full_bytes)} for the same tokens")
    table.add_row("saved", saved_words(report))
    add_rules(table, report)
    table.add_row("seconds", *times_taken)
    console = errors()
    console.print()
    console.print(table)


def _times(seconds: dict[str, float], generated: Generated) -> str:
    width = max(len(f"{taken:.2f}") for taken in seconds.values())
    lines = [f"{taken:{width}.2f} {name}" for name, taken in seconds.items()]
    # The first token comes out of the prefill; decode is the last line.
    made = len(generated.token_ids) - 1
    return "\n".join(lines) + (f" ({made / generated.rest:.1f} tokens/s)" if made and generated.rest else "")
