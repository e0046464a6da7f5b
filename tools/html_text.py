"""HTML text: folders with HTML pages -> one UTF-8 text on standard output, page after page, a paragraph per line.

What the kernels of LESS that come with headwise learnt from, beside Python's manual, is made by it: see docs/less.md.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

# What ends a line.
_BLOCKS = {"p", "div", "li", "dt", "dd", "tr", "pre", "br", "h1", "h2", "h3", "h4", "h5", "h6", "title", "blockquote"}

# What is not meant to be read.
_SILENT = {"script", "style", "head", "nav"}


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self._silent = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._silent += tag in _SILENT
        if tag in _BLOCKS:
            self.pieces.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._silent = max(0, self._silent - (tag in _SILENT))
        if tag in _BLOCKS:
            self.pieces.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.pieces.append(data)


def lines_of(page: str) -> Iterator[str]:
    """The text of a page, a paragraph per line."""
    reader = _Reader()
    reader.feed(page)
    for line in "".join(re.sub(r"[^\S\n]+", " ", piece) for piece in reader.pieces).split("\n\n"):
        joined = " ".join(line.split())
        if joined:
            yield joined


def main(folders: list[str]) -> None:
    """Print the text of every page in the folders, in the order of their names."""
    for folder in folders:
        for path in sorted(Path(folder).rglob("*.html")):
            lines = lines_of(path.read_text(encoding="utf-8", errors="replace"))
            sys.stdout.write("\n".join(lines) + "\n\n")


if __name__ == "__main__":
    main(sys.argv[1:])
