"""Share picture: what every head gives a marked span, before and after -> a PNG of two maps of query heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headwise.files import whole_file
from headwise.report.picture import check_target
from headwise.types import Float, Tensor

# Inches of a cell, and beside the maps.
_CELL, _BESIDE = 0.26, 1.6
_DPI = 150


def save_shares(
    before: Float[Tensor, "layers heads"],
    after: Float[Tensor, "layers heads"],
    steered: Mapping[int, Sequence[int]],
    path: str | Path,
) -> None:
    """Draw both; heads that are steered have a frame. An unfinished file is never left.

    Raises:
        ConfigurationError: when matplotlib is missing.
        InputError: when the file cannot be written.
    """
    target = check_target(path)
    figure = _draw(before, after, steered)
    with whole_file(target, "a picture") as file:
        figure.savefig(file, format="png", dpi=_DPI)


def _draw(before: Tensor, after: Tensor, steered: Mapping[int, Sequence[int]]) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    layers, heads = before.shape
    size = 2 * heads * _CELL + 2 * _BESIDE, layers * _CELL + _BESIDE
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    image: Any = None
    for axis, shares, title in zip(axes, (before, after), ("without steering", "steered"), strict=True):
        image = axis.imshow(shares.numpy(), vmin=0, vmax=1, cmap="cividis", aspect="auto", interpolation="nearest")
        axis.set_title(f"{title}: {_percent(shares)} on average", fontsize=10)
        axis.set_xlabel("query head")
        axis.set_xticks(range(heads), range(heads), fontsize=7)
        axis.set_yticks(range(layers), range(layers), fontsize=7)
        for layer, own in steered.items():
            for head in own:
                axis.add_patch(
                    Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, edgecolor="#D55E00", linewidth=1.6)
                )
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="share of the last token's attention that what is marked gets")
    return figure


def _percent(shares: Tensor) -> str:
    return f"{float(shares.nanmean()):.1%}"
