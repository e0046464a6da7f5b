"""Site hooks: pages of the site that are written elsewhere -> their text: files of the project, and the command line.

Called by mkdocs (mkdocs.yml).
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

import typer
from typer.main import get_command

ROOT = Path(__file__).parents[1]

# Files of the project that are pages of the site.
_PAGES = {
    "BENCHMARKS.md": "about/benchmarks.md",
    "CHANGELOG.md": "about/changelog.md",
    "CONTRIBUTING.md": "about/contributing.md",
    "SECURITY.md": "about/security.md",
    "README.md": "index.md",
}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The text of a page, with what stands for other texts replaced, and links to these turned to their pages."""
    here = page.file.src_uri
    if found := re.fullmatch(r"<!--file:(.+)-->", markdown.strip()):
        name = found[1]
        return _relinked((ROOT / name).read_text(encoding="utf-8"), "", here)
    return _relinked(
        markdown.replace("<!--commands-->", commands()), posixpath.join("docs", posixpath.dirname(here)), here
    )


def _relinked(text: str, folder: str, here: str) -> str:
    """Links as they are in the project, from that folder, as links between pages."""

    def turned(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, link[1]))
        target = path.removeprefix("docs/") if path.startswith("docs/") else _PAGES.get(path)
        return link[0] if target is None else f"]({posixpath.relpath(target, posixpath.dirname(here))}{link[2]})"

    return re.sub(r"\]\((?!\w+:)([^)#\s]+)(#[^)]*)?\)", turned, text)


def commands() -> str:
    """Every command with its options."""
    from headwise.cli.main import app

    command = get_command(app)
    return "\n".join(_described(command, ["headwise"]))


def _described(command: Any, path: list[str]) -> list[str]:
    context = typer.Context(command)
    lines = []
    if path[1:]:
        lines += [f"## {' '.join(path)}", "", (command.help or "").strip(), ""]
    options = [each for each in command.params if getattr(each, "help", None)]
    if path[1:] and options:
        lines += ["| option | means |", "|---|---|"]
        for option in options:
            help_text = " ".join(option.help.split()).replace("|", "\\|")
            lines.append(f"| `{' '.join(option.opts)}` | {help_text} |")
        lines.append("")
    for name in getattr(command, "list_commands", lambda _: [])(context):
        lines += _described(command.get_command(context, name), [*path, name])
    return lines
