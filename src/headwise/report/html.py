"""HTML: the lines of a report and what is held of a full cache -> a table for a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape


def report_html(lines: Sequence[tuple[str, str]], share: float) -> str:
    """A table of names and words under a bar.

    Args:
        share: of the bar that is filled; all of it from 1 on.
    """
    rows = "".join(
        f"<tr><td style='text-align:left;padding-left:{1.5 if name != name.lstrip() else 0.5}em'>{escape(name.strip())}"
        f"</td><td style='text-align:left'>{escape(value)}</td></tr>"
        for name, value in lines
    )
    bar = (
        "<div style='width:24em;height:0.6em;border-radius:0.3em;background:rgba(128,128,128,0.3)'>"
        f"<div style='width:{min(1.0, share):.1%};height:100%;border-radius:0.3em;background:#0072b2'></div></div>"
    )
    return f"<div>{bar}<table>{rows}</table></div>"
