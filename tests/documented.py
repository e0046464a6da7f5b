"""Documented: the pages of the project -> blocks of code on them, and a way to run a page from first to last."""

from __future__ import annotations

import re
import shlex
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import commands

ROOT = Path(__file__).parents[1]
# What is run. `sh` is for what sets up a machine or speaks to a server, `py` for a part of a program whose other parts
# are not on the page, `text` and `json` are nothing to run.
RUN = ("python", "console")
KNOWN = (*RUN, "sh", "py", "text", "json")


@dataclass(frozen=True)
class Block:
    language: str
    line: int
    code: str


def pages():
    """Paths of all pages, as from the root of the project."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [path.relative_to(ROOT).as_posix() for path in found]


def blocks(page):
    """Blocks of code on a page, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        Block(found[1], text[: found.start()].count("\n") + 2, found[2])
        for found in re.finditer(r"^```(\w*)[^\n]*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


def run(page, **given):
    """Run its blocks one after the other, as a reader would: names stay, and a command must succeed.

    Args:
        given: names that a page takes for granted.
    """
    module = types.ModuleType("page")
    # Dataclasses look for the module that they are defined in.
    sys.modules["page"] = module
    vars(module).update(given)
    try:
        _run(page, vars(module))
    finally:
        del sys.modules["page"]


def _run(page, names):
    for block in blocks(page):
        where = f"{page}:{block.line}"
        if block.language == "python":
            # Lines are counted as on the page.
            exec(compile("\n" * (block.line - 1) + block.code, page, "exec"), names)
        elif block.language == "console":
            for line in block.code.splitlines():
                program, *arguments = shlex.split(line)
                assert program == "headwise", f"{where}: only headwise's own commands are run"
                answer = commands.call(*arguments)
                assert answer.code == 0, f"{where}: {line}\n{answer.out}{answer.err}"
