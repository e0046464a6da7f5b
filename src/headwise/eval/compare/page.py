"""Page: the results of a run -> pictures, and one HTML file that holds them with the tables and needs nothing else."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from headwise.eval.compare.curves import save_bytes_curves, save_speed_curves
from headwise.eval.compare.maps import save_rule_maps, save_share_maps
from headwise.eval.compare.points import bytes_panels, speed_panels
from headwise.eval.setting import describe_setting
from headwise.eval.tables import LEGEND, make_grids
from headwise.files import write_text

PAGE = "compare.html"

# Everything that identifies a run.
_APPENDIX = ("command", "configuration", "inputs", "model", "machine", "versions")

_CURVES = (
    "one line per policy, from its smallest size to its largest, with 95 % intervals. Ringed: the Pareto front, rows "
    "that no other row beats in both. Dashed in a band: random eviction of the same sizes. Dotted: the full cache."
)


@dataclass(frozen=True)
class Picture:
    """A PNG file of the page."""

    title: str
    caption: str
    path: Path

    @property
    def data(self) -> str:
        """The file, as an address that holds it."""
        return f"data:image/png;base64,{base64.b64encode(self.path.read_bytes()).decode()}"


def write_comparison(results: dict[str, Any], folder: Path, links: Mapping[str, str] | None = None) -> list[Path]:
    """Write the pictures and the page that has them in it.

    Args:
        results: as `results.json` has them.
        folder: where they go; it must exist.
        links: titles and names of other pages in it.

    Returns:
        the files, the page first.

    Raises:
        InputError: when a file cannot be written.
    """
    pictures = _draw(results, folder)
    text = (
        make_environment(autoescape=True)
        .get_template("page.html.jinja")
        .render(
            title=f"headwise compare: {results['model']['name']}",
            setting=describe_setting(results),
            pictures=pictures,
            links=links or {},
            grids=make_grids(results["summaries"]),
            legend=LEGEND,
            appendix=json.dumps({name: results[name] for name in _APPENDIX}, indent=1),
        )
    )
    write_text(folder / PAGE, text)
    return [folder / PAGE, *(picture.path for picture in pictures)]


def make_environment(*, autoescape: bool) -> Environment:
    """What renders the templates of this folder; a name that is not given is an error."""
    return Environment(
        loader=PackageLoader("headwise.eval.compare"),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _draw(results: dict[str, Any], folder: Path) -> list[Picture]:
    """The pictures that there is something to be seen in."""
    pictures = []
    for title, name, panels, save in (
        ("Quality against bytes", "quality-bytes.png", bytes_panels(results), save_bytes_curves),
        ("Quality against speed", "quality-speed.png", speed_panels(results), save_speed_curves),
    ):
        drawn = [panel for panel in panels if any(panel.series.values())]
        if drawn:
            save(drawn, folder / name)
            pictures.append(Picture(title, f"{title}: {_CURVES}", folder / name))
    if save_share_maps(results, folder / "kept.png"):
        caption = "Share of the tokens that every KV head keeps at the end of the context, mean over passages."
        pictures.append(Picture("What every head keeps", caption, folder / "kept.png"))
    for label, path in save_rule_maps(results, folder).items():
        pictures.append(Picture(f"Rules of {label}", "Rule of every KV head on the first passage.", path))
    return pictures
