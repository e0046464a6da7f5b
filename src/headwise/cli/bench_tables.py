"""Bench tables: a record of a run and the verdicts on it -> lines for people, on standard output."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from headwise.cli.tables import facts_table, figures_tables, output, plain_table

if TYPE_CHECKING:
    from rich.console import Console

    from headwise.bench.expectations import Verdict
    from headwise.bench.record import Measurement, PrefillCosts, Record, Result

_NOTHING = "-"

# How far stock's rounds may lie apart where figures are to be believed.
_STEADY = 0.15
_STYLES = {"met": "bold green", "missed": "yellow", "not run": "dim"}


def show_record(record: Record, verdicts: list[Verdict], written_for: str | None) -> None:
    """Everything measured, then what was expected."""
    console = output()
    console.print(_setting(record))
    for note in record.notes:
        console.print(Text(f"note: {note}", style="yellow"))
    for result in record.results:
        console.print(Text(f"\n{result.configuration.title}", style="bold"))
        for table in _costs(result, console):
            console.print(table)
        for measurement in result.measurements:
            if measurement.failure is not None:
                console.print(Text(f"{measurement.name}: {measurement.failure}", style="yellow"))
        for line in _bandwidth(result):
            console.print(line)
        own = None if result.own is None else result.step_ms(result.own)
        if own is not None:
            console.print(f"a step of the model alone takes {_number(own)} ms; bound: that, and what is kept read once")
        if result.stock_spread is not None and result.stock_spread > _STEADY:
            busy = f"stock's own rounds differ by {result.stock_spread:.0%}: the machine is too busy to judge by this"
            console.print(Text(busy, style="yellow"))
    if record.prefills is not None:
        console.print(_prefills(record.prefills))
    if written_for is not None:
        console.print(Text("\nExpectations", style="bold"))
        console.print(f"written for: {written_for}")
        console.print(_expectations(verdicts))


def _setting(record: Record) -> Table:
    machine, settings = record.machine, record.settings
    table = facts_table()
    table.add_row("model", str(record.model.get("name", "not loaded")))
    cores = f"{machine['processor']}, {machine['cores']} cores, threads: {machine['threads']}"
    table.add_row("machine", f"{cores}, {machine['gpu']}" if "gpu" in machine else cores)
    kernels = {m.kernel for result in record.results for m in result.measurements if m.kernel is not None}
    table.add_row("kernels", ", ".join(sorted(kernels)))
    table.add_row("versions", ", ".join(f"{name} {version}" for name, version in record.versions.items()))
    table.add_row(
        "measured",
        f"{settings['rounds']} rounds in turn, {settings['steps']} steps each; medians, and the least and the most; "
        f"evictions every {settings['evict_every']} tokens",
    )
    return table


def _costs(result: Result, console: Console) -> list[Table]:
    columns = ("", "tokens/s", "range", "x stock", "ms/step", "bound", "attn", "prefill", "x prefill", "held", "peak")
    rows = [_cells(result, measurement) for measurement in result.measurements if measurement.prefill is not None]
    return figures_tables((*columns, "kept"), rows, console)


def _prefills(costs: PrefillCosts) -> Table:
    table = plain_table(f"prompt of {costs.context:,} tokens", "s", "beyond stock")
    for look, seconds in {"stock": costs.stock, **costs.looks}.items():
        excess = costs.excess(look)
        table.add_row(look, _number(median(seconds)), _NOTHING if excess is None else f"{excess:+.1%}")
    for look, failure in costs.failures.items():
        table.add_row(look, failure, "")
    return table


def _cells(result: Result, measurement: Measurement) -> list[str | Text]:
    from headwise.bench.record import Spread

    speed, ratio = Spread.of(result.tokens_per_second(measurement)), Spread.of(result.ratios(measurement))
    step, prefill, held = result.step_ms(measurement), measurement.prefill, measurement.after_prompt
    assert prefill is not None
    bound, slower = result.bound_ms(measurement), result.prefill_ratio(measurement)
    return [
        measurement.name,
        _NOTHING if speed is None else _number(speed.median),
        _NOTHING if speed is None else f"{_number(speed.least)}..{_number(speed.most)}",
        Text(_NOTHING if ratio is None else f"{ratio.median:.2f}", style="bold"),
        _NOTHING if step is None else _number(step),
        _NOTHING if bound is None else _number(bound),
        _share(measurement.attention_share),
        f"{prefill.seconds:.2f} s",
        _NOTHING if slower is None else f"{slower:.2f}",
        _size(None if held is None else held.allocated_bytes),
        _size(prefill.peak_bytes),
        _NOTHING if held is None else f"{held.kept_ratio:.1%}",
    ]


def _bandwidth(result: Result) -> list[str]:
    if result.ceiling is None:
        return []
    lines = [f"memory gives {result.ceiling.bytes_per_second / 1e9:.1f} GB/s ({result.ceiling.method})"]
    for measurement in result.measurements:
        speed, share = measurement.kernel_speed, result.kernel_share(measurement)
        if speed is not None and share is not None:
            beyond = "" if speed.beyond_cache is not False else "; they fit into the processor's cache"
            rate = f"{speed.bytes / 2**20:.1f} MiB at {speed.best / 1e9:.1f} GB/s"
            lines.append(f"{measurement.name}: decode kernel reads {rate}, {share:.0%} of that{beyond}")
    return lines


def _expectations(verdicts: list[Verdict]) -> Table:
    table = plain_table("expectation", "wanted", "measured", "")
    for verdict in verdicts:
        word = Text(verdict.verdict, style=_STYLES[verdict.verdict])
        table.add_row(verdict.name, verdict.target, verdict.shown or _NOTHING, word)
    return table


def _share(share: float | None) -> str:
    return _NOTHING if share is None else f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"


def _number(figure: float) -> str:
    return f"{figure:.1f}" if figure < 100 else f"{figure:,.0f}"


def _size(count: int | None) -> str:
    from headwise.units import format_bytes

    return _NOTHING if count is None else format_bytes(count)
