"""Picture: a record -> a PNG with decode speed and memory held against context length, one line per contender."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from headwise.bench.contenders import dtype_name
from headwise.bench.record import Measurement, Record, Result
from headwise.errors import CacheStateError
from headwise.files import whole_file
from headwise.measure.plot_style import COLOURS, MARKERS
from headwise.report.picture import check_target

_STOCK = "#222222"
_PALE_INK = "#666666"

# Inches.
_WIDTH, _ROW_HEIGHT, _TITLE = 10.5, 3.6, 0.95
_DPI = 150


def save_picture(record: Record, path: str | Path) -> None:
    """Draw one row of two panels for every batch and dtype; an unfinished file is never left.

    Raises:
        CacheStateError: when nothing has been measured.
        ConfigurationError: when matplotlib is missing.
        InputError: when the file cannot be written.
    """
    target = check_target(path)
    rows = _rows(record)
    if not rows:
        raise CacheStateError("there is nothing to draw yet: no configuration has been measured")
    figure = _draw(record, rows)
    with whole_file(target, "a picture") as file:
        figure.savefig(file, format="png", dpi=_DPI)


def _rows(record: Record) -> dict[tuple[int, str], list[Result]]:
    """Results by batch and dtype, ordered by context; without those that have no speed at all."""
    rows: dict[tuple[int, str], list[Result]] = {}
    for result in sorted(record.results, key=lambda result: result.configuration.context):
        if any(measurement.round_seconds for measurement in result.measurements):
            configuration = result.configuration
            rows.setdefault((configuration.batch, dtype_name(configuration.dtype)), []).append(result)
    return rows


def _draw(record: Record, rows: dict[tuple[int, str], list[Result]]) -> Any:
    from matplotlib.figure import Figure

    height = _TITLE + _ROW_HEIGHT * len(rows)
    figure = Figure(figsize=(_WIDTH, height), facecolor="white")
    names = list(dict.fromkeys(m.name for result in record.results for m in result.measurements if m.round_seconds))
    grid = figure.subplots(
        len(rows), 2, squeeze=False, gridspec_kw={"top": 1 - _TITLE / height, "bottom": 0.6 / height, "hspace": 0.35}
    )
    figure.subplots_adjust(left=0.07, right=0.83, wspace=0.25)
    handles: dict[str, Any] = {}
    for (speed, memory), ((batch, dtype), results) in zip(grid, rows.items(), strict=True):
        for place, name in enumerate(names):
            line = _line(speed, results, name, place, _speed)
            _line(memory, results, name, place, _mebibytes)
            if line is not None:
                handles[name] = line
        contexts = [result.configuration.context for result in results]
        _style(speed, contexts, f"decode, batch {batch}, {dtype}", "tokens/s")
        _style(memory, contexts, "cache held after the prompt", "MiB")
    figure.legend(
        handles=list(handles.values()),
        loc="upper left",
        bbox_to_anchor=(0.84, 1 - _TITLE / height),
        frameon=False,
        fontsize=9,
    )
    machine = record.machine
    figure.text(0.07, 1 - 0.3 / height, str(record.model.get("name", "")), fontsize=13, fontweight="bold")
    where = str(machine.get("gpu") or f"{machine.get('processor')}, threads: {machine.get('threads')}")
    figure.text(0.07, 1 - 0.5 / height, where, fontsize=9.5, color=_PALE_INK)
    return figure


def _line(axes: Any, results: list[Result], name: str, place: int, figure_of: Any) -> Any:
    """The line that was drawn; None where the contender has no figures here."""
    points = []
    for result in results:
        measurement = result.find(name)
        value = None if measurement is None else figure_of(result, measurement)
        if value is not None:
            points.append((result.configuration.context, value))
    if not points:
        return None
    colour = _STOCK if name == "stock" else COLOURS[(place - 1) % len(COLOURS)]
    (line,) = axes.plot(
        *zip(*points, strict=True),
        color=colour,
        marker=MARKERS[place % len(MARKERS)],
        linestyle="--" if name == "stock" else "-",
        markersize=5,
        lw=1.6,
        label=name,
    )
    return line


def _speed(result: Result, measurement: Measurement) -> float | None:
    speeds = result.tokens_per_second(measurement)
    return median(speeds) if speeds else None


def _mebibytes(_: Result, measurement: Measurement) -> float | None:
    return None if measurement.after_prompt is None else measurement.after_prompt.allocated_bytes / 2**20


def _style(axes: Any, contexts: list[int], title: str, unit: str) -> None:
    if len(contexts) > 1:
        axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("context, tokens", fontsize=9)
    axes.set_ylabel(unit, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", color="#E6E6E6", lw=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
