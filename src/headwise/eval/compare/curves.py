"""Curves: panels of points -> a PNG with one line per policy in every panel, named where it begins."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from headwise.eval.compare.points import Panel, Point
from headwise.eval.contenders import RANDOM
from headwise.files import whole_file
from headwise.measure.plot_style import COLOURS, MARKERS
from headwise.units import format_bytes

_INK, _PALE_INK, _RANDOM_INK, _LINE = "#222222", "#666666", "#8A8A8A", "#E6E6E6"

# Inches.
_WIDTH, _HEIGHT, _COLUMNS = 5.6, 4.1, 2
_DPI = 150

# Share of a panel that names take, and letters in a line of it; points between two names.
_MARGIN, _LETTERS, _GAP = 0.3, 20, 11.0

_BYTES, _SPEED = "bytes kept at the end of the context", "decode, tokens/s"


def save_bytes_curves(panels: Sequence[Panel], target: Path) -> None:
    """Quality against bytes; an unfinished file is never left.

    Raises:
        InputError: when the file cannot be written.
    """
    _save(panels, target, by_bytes=True)


def save_speed_curves(panels: Sequence[Panel], target: Path) -> None:
    """Quality against tokens per second; an unfinished file is never left.

    Raises:
        InputError: when the file cannot be written.
    """
    _save(panels, target, by_bytes=False)


def spread(places: Sequence[float], gap: float, top: float) -> list[float]:
    """The places in their order, moved as little as it takes to be `gap` apart and below `top`."""
    order = sorted(range(len(places)), key=places.__getitem__)
    moved = list(places)
    for below, above in pairwise(order):
        moved[above] = max(moved[above], moved[below] + gap)
    for above in reversed(order):
        moved[above] = min(moved[above], top)
        top = moved[above] - gap
    return moved


def fold(spec: str, letters: int) -> list[str]:
    """A policy's words in short lines, parameters apart from the name."""
    return textwrap.wrap(spec.replace(":", ": "), letters)


def _save(panels: Sequence[Panel], target: Path, *, by_bytes: bool) -> None:
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(_WIDTH * columns, _HEIGHT * rows), facecolor="white", layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in places[len(panels) :]:
        axes.set_visible(False)
    for axes, panel in zip(places, panels, strict=False):
        _draw(axes, panel, by_bytes)
        (_style_bytes if by_bytes else _style_speed)(axes, panel)
    # Names are put where they do not touch, which takes the final size of a panel.
    figure.draw_without_rendering()
    for axes, panel in zip(places, panels, strict=False):
        _name(axes, panel, by_bytes)
    with whole_file(target, "a picture") as file:
        figure.savefig(file, format="png", dpi=_DPI)


def _draw(axes: Any, panel: Panel, by_bytes: bool) -> None:
    for place, (name, points) in enumerate(panel.series.items()):
        if name == RANDOM:
            _draw_random(axes, points, by_bytes)
        else:
            _draw_series(
                axes, points, _colour(name, place), "-", MARKERS[(place + place // len(MARKERS)) % len(MARKERS)]
            )
    fronts = [point for points in panel.series.values() for point in points if point.front]
    axes.plot(
        [point.cost for point in fronts],
        [point.quality for point in fronts],
        linestyle="none",
        marker="o",
        markersize=13,
        markerfacecolor="none",
        markeredgecolor=_INK,
        markeredgewidth=1.1,
        zorder=5,
    )
    if _is_logarithmic(panel):
        _style_logarithmic(axes)
    axes.set_title("\n".join(textwrap.wrap(panel.title, 60)), fontsize=10.5, loc="left", color=_INK)
    better = "higher" if panel.higher_is_better else "lower"
    axes.set_ylabel(f"{panel.metric}  ({better} is better)", fontsize=9, color=_INK)
    axes.tick_params(labelsize=8, labelcolor=_PALE_INK)
    axes.grid(axis="y", color=_LINE, lw=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if panel.full is not None:
        _draw_full(axes, panel, panel.full)


def _draw_series(axes: Any, points: Sequence[Point], colour: str, line: str, marker: str) -> None:
    axes.plot(
        [point.cost for point in points],
        [point.quality for point in points],
        color=colour,
        linestyle=line,
        marker=marker,
        markersize=5,
        lw=1.6,
        zorder=4,
    )
    for point in points:
        if point.low is not None:
            axes.plot([point.cost] * 2, [point.low, point.high], color=colour, lw=0.9, alpha=0.55, zorder=3)


def _draw_random(axes: Any, points: Sequence[Point], by_bytes: bool) -> None:
    """A line in a band: what every policy must leave behind. Speeds at equal sizes vary; there it is dots."""
    if not by_bytes:
        _draw_series(axes, points, _RANDOM_INK, "none", ".")
        return
    costs = [point.cost for point in points]
    axes.plot(
        costs, [point.quality for point in points], color=_RANDOM_INK, lw=1.4, linestyle="--", marker=".", zorder=2
    )
    low = [point.quality if point.low is None else point.low for point in points]
    high = [point.quality if point.high is None else point.high for point in points]
    axes.fill_between(costs, low, high, color=_RANDOM_INK, alpha=0.16, lw=0, zorder=1)


def _draw_full(axes: Any, panel: Panel, full: Point) -> None:
    axes.axvline(full.cost, color=_INK, lw=0.9, linestyle=":", zorder=1)
    # What is lost is nothing but noise, whose place on a logarithmic axis means nothing.
    if not _is_logarithmic(panel):
        axes.axhline(full.quality, color=_INK, lw=0.9, linestyle=":", zorder=1)
    axes.annotate(
        f"full cache: {full.quality:.2g}",
        (full.cost, 0),
        xycoords=("data", "axes fraction"),
        xytext=(-3, 3),
        textcoords="offset points",
        rotation=90,
        ha="right",
        va="bottom",
        fontsize=8,
        color=_PALE_INK,
    )


def _style_bytes(axes: Any, panel: Panel) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda size, _: format_bytes(round(size)))
    axes.set_xlabel(_BYTES, fontsize=9, color=_INK)
    low, high = (end(_costs(panel)) for end in (min, max))
    # Names stand on the left: the smallest caches are furthest apart.
    room = (high / low) ** (_MARGIN / (1 - _MARGIN)) if high > low else 2
    axes.set_xlim(low / room, high * 1.08)


def _style_speed(axes: Any, panel: Panel) -> None:
    axes.set_xlabel(_SPEED, fontsize=9, color=_INK)
    low, high = (end(_costs(panel)) for end in (min, max))
    width = (high - low) or high
    # And the fastest: here on the right.
    axes.set_xlim(low - width * 0.05, high + width * _MARGIN / (1 - _MARGIN))


def _style_logarithmic(axes: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _name(axes: Any, panel: Panel, on_the_left: bool) -> None:
    """Every policy's name in a column, with a thin line to the smallest of its caches."""
    named = [(name, place, points[0]) for place, (name, points) in enumerate(panel.series.items()) if points]
    heights = [axes.transData.transform((point.cost, point.quality))[1] for _, _, point in named]
    box, pixels = axes.get_window_extent(), axes.figure.dpi / 72
    lines = [fold(name, _LETTERS) for name, _, _ in named]
    gap = _GAP * pixels * max(map(len, lines), default=1)
    moved = spread(heights, gap, box.y1 - gap / 2)
    for (name, place, point), height, text in zip(named, moved, lines, strict=True):
        colour = _colour(name, place)
        axes.annotate(
            "\n".join(text),
            (point.cost, point.quality),
            xytext=(0.012 if on_the_left else 0.988, (height - box.y0) / box.height),
            textcoords="axes fraction",
            ha="left" if on_the_left else "right",
            fontsize=8.5,
            color=colour,
            va="center",
            fontweight="bold",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85},
            zorder=6,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6, "alpha": 0.6, "shrinkA": 2, "shrinkB": 3},
        )


def _colour(name: str, place: int) -> str:
    return _RANDOM_INK if name == RANDOM else COLOURS[place % len(COLOURS)]


def _is_logarithmic(panel: Panel) -> bool:
    """Losses lie orders of magnitude apart; shares and times do not."""
    return not panel.higher_is_better and all(
        point.quality > 0 and (point.low is None or point.low > 0)
        for points in panel.series.values()
        for point in points
    )


def _costs(panel: Panel) -> list[float]:
    points = [point for points in panel.series.values() for point in points]
    return [point.cost for point in [*points, *([panel.full] if panel.full else [])]]
