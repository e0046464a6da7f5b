"""Documented: a page of the project -> its blocks of code, run from first to last."""

from __future__ import annotations

import shlex
import sys
import types

from pages import blocks

import commands

# What is run. `sh` is for what sets up a machine or speaks to a server, `py` for a part of a program whose other parts
# are not on the page, `text` and `json` are nothing to run.
RUN = ("python", "console")
KNOWN = (*RUN, "sh", "py", "text", "json")


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
