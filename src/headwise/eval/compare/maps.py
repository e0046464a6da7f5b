"""Maps: what every head keeps under every policy -> a PNG of shares by layer and KV head, and PNGs of rules."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from headwise.eval.compare.curves import fold
from headwise.eval.contenders import FULL, RANDOM
from headwise.eval.kept import rebuild_report
from headwise.eval.speed import Speed
from headwise.files import whole_file
from headwise.report.picture import save_map

_INK, _PALE_INK, _STOCK = "#222222", "#666666", "#D9D9D9"

# A map of colours that differ in lightness alone: no colour vision is needed.
_COLOURS = "cividis"

# Inches: of a cell, of a map at least and at most, and around the maps.
_CELL_WIDTH, _CELL_HEIGHT = 0.2, 0.085
_LEAST, _MOST = 1.15, 3.2
_TITLE, _NAMES, _BAR = 0.75, 1.8, 1.0
# In a line of a policy's name.
_LETTERS = 17
_DPI = 150

Shares = np.ndarray[Any, np.dtype[np.float64]]


def kept_shares(results: dict[str, Any]) -> dict[str, Shares]:
    """Share of the tokens that every head keeps, `[layers, KV heads]`, by label; the mean over all passages.

    Layers that are not compressed are NaN.
    """
    found: dict[str, list[Shares]] = {}
    for unit in _units(results):
        found.setdefault(unit["policy"], []).append(_shares(unit["details"]["kept"]))
    return {label: np.mean(shares, axis=0) for label, shares in found.items()}


def save_share_maps(results: dict[str, Any], target: Path) -> bool:
    """Draw the maps of all policies in one colour scale: a policy's in a row, from its smallest size on.

    Returns:
        whether there was anything to draw.

    Raises:
        InputError: when the file cannot be written.
    """
    rows = _rows(results)
    if rows:
        figure = _draw(rows, kept_shares(results))
        with whole_file(target, "a picture") as file:
            figure.savefig(file, format="png", dpi=_DPI)
    return bool(rows)


def save_rule_maps(results: dict[str, Any], folder: Path) -> dict[str, Path]:
    """Draw which rule every head has on the first passage, for the policies that choose among rules.

    Returns:
        the files, by label.

    Raises:
        InputError: when a file cannot be written.
    """
    first: dict[str, dict[str, Any]] = {}
    for unit in _units(results):
        first.setdefault(unit["policy"], unit["details"]["kept"])
    choosing = {label: kept for label, kept in first.items() if len(kept["rungs"]) > 1}
    files = {label: folder / f"rules-{number}-{_slug(label)}.png" for number, label in enumerate(choosing, start=1)}
    for label, kept in choosing.items():
        save_map(rebuild_report(kept), files[label])
    return files


def _units(results: dict[str, Any]) -> list[dict[str, Any]]:
    return [unit for unit in results["units"] if unit["task"] == Speed.name]


def _shares(kept: dict[str, Any]) -> Shares:
    heads = max((len(layer["kept_tokens"]) for layer in kept["layers"] if layer["kept_tokens"]), default=1)
    rows = [layer["kept_tokens"] or [np.nan] * heads for layer in kept["layers"]]
    shares: Shares = np.array(rows, dtype=np.float64) / kept["seen_tokens"]
    return shares


def _rows(results: dict[str, Any]) -> dict[str, list[str]]:
    """Labels that have been measured, by policy; the full cache and random eviction are even, and left out."""
    sizes = {unit["policy"]: unit["kept_ratio"] for unit in reversed(_units(results))}
    rows: dict[str, list[str]] = {}
    for entry in results["configuration"]["lineup"]:
        if entry["label"] in sizes and entry["series"] not in (FULL, RANDOM):
            rows.setdefault(entry["series"], []).append(entry["label"])
    return {series: sorted(labels, key=sizes.__getitem__) for series, labels in rows.items()}


def _draw(rows: dict[str, list[str]], shares: dict[str, Shares]) -> Any:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    layers, heads = next(iter(shares.values())).shape
    width, height = (
        min(max(cell * count, _LEAST), _MOST) for cell, count in ((_CELL_WIDTH, heads), (_CELL_HEIGHT, layers))
    )
    columns = max(map(len, rows.values()))
    total = (_NAMES + (width + 0.35) * columns + _BAR, 0.3 + (height + _TITLE) * len(rows))
    figure = Figure(figsize=total, facecolor="white")

    def axes(x: float, y: float, wide: float, high: float) -> Any:
        return figure.add_axes((x / total[0], y / total[1], wide / total[0], high / total[1]))

    for down, (series, labels) in enumerate(rows.items()):
        y = total[1] - (height + _TITLE) * (down + 1) + 0.25
        name = "\n".join(fold(series, _LETTERS))
        figure.text(
            0.15 / total[0], (y + height) / total[1], name, fontsize=9.5, fontweight="bold", color=_INK, va="top"
        )
        for across, label in enumerate(labels):
            chart = axes(_NAMES + (width + 0.35) * across, y, width, height)
            _draw_map(chart, shares[label], label.removeprefix(series).strip())
            if across == 0:
                chart.set_ylabel("layer", fontsize=8, color=_INK)
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), _COLOURS), cax=axes(total[0] - _BAR + 0.1, y, 0.14, height))
    bar.ax.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    bar.ax.tick_params(labelsize=8, labelcolor=_PALE_INK)
    bar.set_label("kept", fontsize=9, color=_INK)
    return figure


def _draw_map(chart: Any, shares: Shares, size: str) -> None:
    from matplotlib import colormaps

    colours = colormaps[_COLOURS].with_extremes(bad=_STOCK)
    chart.imshow(shares, cmap=colours, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    layers, heads = shares.shape
    chart.set_yticks(range(0, layers, max(1, layers // 6)))
    chart.set_xticks(range(0, heads, max(1, heads // 8)))
    chart.tick_params(length=0, labelsize=7, labelcolor=_PALE_INK)
    chart.set_xlabel("KV head", fontsize=8, color=_INK, labelpad=1)
    mean = "not compressed" if np.isnan(shares).all() else f"{np.nanmean(shares):.1%} kept"
    chart.set_title(f"{size}\n{mean}".strip(), fontsize=8.5, color=_INK, loc="left")
    for spine in chart.spines.values():
        spine.set_visible(False)


def _slug(label: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", label.lower()).strip("-.")
