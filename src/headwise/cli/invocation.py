"""Invocation: the words after the program's name -> the command line, as records have it."""

from __future__ import annotations

import shlex
from contextvars import ContextVar

words: ContextVar[tuple[str, ...]] = ContextVar("words")


def command_line() -> str:
    """What was typed, as a shell takes it."""
    return shlex.join(["headwise", *words.get()])
