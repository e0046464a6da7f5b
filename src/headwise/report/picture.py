"""Picture: a report -> a PNG map of layers and KV heads, coloured by rule, with the share of tokens each head keeps."""

from __future__ import annotations

import math
import textwrap
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwise.errors import CacheStateError, ConfigurationError
from headwise.files import check_target_file, whole_file
from headwise.units import format_bytes

if TYPE_CHECKING:
    from headwise.report.report import Report

# Okabe and Ito's colours, which the colour-blind can tell apart, from pale for the cheap rules to strong.
_COLOURS = ("#F0E442", "#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#999933", "#44AA99")
_FULL = "#0072B2"
_STOCK = "#E6E6E6"
_INK = "#222222"
_PALE_INK = "#666666"

# Inches.
_CELL_HEIGHT = 0.27
_BARS = 1.25
_LEGEND = 2.2
_DPI = 150

# Height of a line of the title, and letters of it in an inch.
_TITLE_LINE = 0.25
_LETTERS = 8


def save_map(report: Report, path: str | Path, sequence: int = 0) -> None:
    """Draw which rule every KV head has and what share of the tokens it keeps; an unfinished file is never left.

    Args:
        report: of a cache that has seen a prompt.
        path: of the PNG file; its folder must exist.
        sequence: of the batch.

    Raises:
        ConfigurationError: when matplotlib is missing, or there is no such sequence.
        CacheStateError: when the cache has seen nothing.
        InputError: when the file cannot be written.
    """
    target = check_target(path)
    if not report.full_bytes:
        raise CacheStateError("there is nothing to draw yet: the cache has seen no token")
    batch = max((len(kept) for kept in report.kept_tokens if kept is not None), default=1)
    if not 0 <= sequence < batch:
        raise ConfigurationError(f"there is no sequence {sequence} in a batch of {batch}")
    figure = _draw(report, sequence)
    with whole_file(target, "a picture") as file:
        figure.savefig(file, format="png", dpi=_DPI)


def check_matplotlib() -> None:
    """Refuse to begin what will need a picture.

    Raises:
        ConfigurationError: when matplotlib is missing.
    """
    if find_spec("matplotlib") is None:
        raise ConfigurationError("a picture needs matplotlib: pip install 'headwise[plot]'")


def check_target(path: str | Path) -> Path:
    """Where a picture will be written, looked at before any work is done for it.

    Raises:
        ConfigurationError: when matplotlib is missing.
        InputError: when no file can be written there.
    """
    check_matplotlib()
    return check_target_file(path, "a picture")


def _draw(report: Report, sequence: int) -> Any:
    from matplotlib.figure import Figure

    layers = len(report.layers)
    heads = max((kept.shape[1] for kept in report.kept_tokens if kept is not None), default=1)
    cell_width = 0.8 if heads <= 4 else 0.62 if heads <= 8 else 0.46
    map_width, map_height = max(2.4, cell_width * heads), max(2.2, _CELL_HEIGHT * layers)
    left, right, bottom, gap = 0.75, 0.25, 0.6, 0.15
    width = left + map_width + gap + _BARS + gap + _LEGEND + right
    title = textwrap.wrap(report.policy, int((width - left - right) * _LETTERS))
    top = 0.7 + _TITLE_LINE * len(title)
    height = top + map_height + bottom
    figure = Figure(figsize=(width, height), facecolor="white")

    def axes(x: float, wide: float) -> Any:
        return figure.add_axes((x / width, bottom / height, wide / width, map_height / height))

    chart, bars = axes(left, map_width), axes(left + map_width + gap, _BARS)
    colours = _colours(report)
    _draw_cells(chart, report, sequence, colours, heads, cell_width)
    _draw_bars(bars, report, sequence)
    _draw_legend(figure, report, sequence, colours, (left + map_width + 2 * gap + _BARS) / width, 1 - top / height)
    _draw_title(figure, report, title, left / width, height)
    return figure


def _draw_cells(chart: Any, report: Report, sequence: int, colours: dict[str, str], heads: int, width: float) -> None:
    from matplotlib.patches import Rectangle

    small = 7.5 if width > 0.5 else 6.5
    for index, layer in enumerate(report.layers):
        if layer.kept_tokens is None or layer.rules is None:
            chart.add_patch(Rectangle((0, index), heads, 1, facecolor=_STOCK, edgecolor="#B5B5B5", hatch="////", lw=0))
            continue
        kept = (layer.kept_tokens[sequence] / report.seen_tokens).tolist()
        for head, (share, rule) in enumerate(zip(kept, layer.rules[sequence].tolist(), strict=True)):
            colour = colours[rule]
            chart.add_patch(Rectangle((head, index), 1, 1, facecolor=colour, edgecolor="white", lw=1.2))
            chart.text(
                head + 0.5,
                index + 0.52,
                f"{share:.0%}",
                ha="center",
                va="center",
                fontsize=small,
                color=_ink_on(colour),
            )
    chart.set_xlim(0, heads)
    _style(chart, len(report.layers))
    step = max(1, len(report.layers) // 16)
    chart.set_yticks([i + 0.5 for i in range(0, len(report.layers), step)], range(0, len(report.layers), step))
    chart.set_xticks([i + 0.5 for i in range(heads)], range(heads))
    chart.tick_params(length=0, labelsize=8, labelcolor=_PALE_INK)
    chart.set_xlabel("KV head", fontsize=9, color=_INK)
    chart.set_ylabel("layer", fontsize=9, color=_INK)


def _draw_bars(bars: Any, report: Report, sequence: int) -> None:
    """The mean of every layer beside it: where in the model the memory goes."""
    for index, layer in enumerate(report.layers):
        if layer.kept_tokens is not None:
            share = float(layer.kept_tokens[sequence].double().mean()) / report.seen_tokens
            bars.barh(index + 0.5, 1, height=0.62, color="#F0F0F0")
            bars.barh(index + 0.5, share, height=0.62, color="#7F7F7F")
    bars.set_xlim(0, 1)
    _style(bars, len(report.layers))
    bars.set_yticks([])
    bars.set_xticks([0, 0.5, 1], ["0", "50%", "100%"])
    bars.tick_params(length=0, labelsize=8, labelcolor=_PALE_INK)
    bars.set_xlabel("kept, mean of layer", fontsize=9, color=_INK)


def _draw_legend(figure: Any, report: Report, sequence: int, colours: dict[str, str], x: float, y: float) -> None:
    from matplotlib.patches import Patch

    rules = [rule for layer in report.rules if layer is not None for rule in layer[sequence].tolist()]
    entries = [
        Patch(facecolor=colour, label=f"{_fold(rule)}  ({rules.count(rule)})", alpha=1 if rule in rules else 0.35)
        for rule, colour in colours.items()
    ]
    stock = sum(layer is None for layer in report.rules)
    if stock:
        own = f"not compressed\n({stock} layer{'s' if stock > 1 else ''})"
        entries.append(Patch(facecolor=_STOCK, edgecolor="#B5B5B5", hatch="////", lw=0, label=own))
    legend = figure.legend(
        handles=entries,
        title="rule  (heads)" if rules else None,
        loc="upper left",
        bbox_to_anchor=(x, y),
        borderaxespad=0,
        frameon=False,
        fontsize=8.5,
        title_fontsize=9,
        alignment="left",
        labelspacing=0.9,
        handlelength=1.2,
        handleheight=1.2,
        labelcolor=_INK,
    )
    legend.get_title().set_color(_PALE_INK)


def _draw_title(figure: Any, report: Report, title: list[str], x: float, height: float) -> None:
    saved = f"{report.saved_bytes / report.full_bytes:.0%} of {format_bytes(report.full_bytes)}"
    for index, line in enumerate(title):
        y = 1 - (0.38 + _TITLE_LINE * index) / height
        figure.text(x, y, line, fontsize=13, fontweight="bold", color=_INK)
    summary = f"{report.seen_tokens:,} tokens   ·   {report.kept_ratio:.1%} kept   ·   {saved} saved"
    figure.text(x, 1 - (0.43 + _TITLE_LINE * len(title)) / height, summary, fontsize=9.5, color=_PALE_INK)


def _style(axes: Any, layers: int) -> None:
    # Layer 0 is on top, as text is read.
    axes.set_ylim(layers, 0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _colours(report: Report) -> dict[str, str]:
    """A colour for every rule of the ladder, whether or not a head took it: pictures of two runs compare."""
    rungs = dict.fromkeys(rung for layer in report.layers for rung in layer.rungs)
    cheaper = [rung for rung in rungs if rung != "full"]
    colours = {rung: _COLOURS[index % len(_COLOURS)] for index, rung in enumerate(cheaper)}
    return colours | ({"full": _FULL} if "full" in rungs else {})


def _fold(rule: str) -> str:
    """A long rule name in lines that fit the legend."""
    lines = [""]
    for index, part in enumerate(rule.split("+")):
        part = part if index == 0 else f"+{part}"
        if lines[-1] and len(lines[-1]) + len(part) > 24:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _ink_on(colour: str) -> str:
    """Black or white, whichever has the greater contrast with that colour (WCAG 2, relative luminance)."""

    def luminance(code: str) -> float:
        red, green, blue = (math.pow(int(code[at : at + 2], 16) / 255, 2.2) for at in (1, 3, 5))
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue + 0.05

    there = luminance(colour)
    return "white" if luminance("#FFFFFF") / there > there / luminance(_INK) else _INK
