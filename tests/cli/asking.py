"""What the tests of the command line ask for most."""

from __future__ import annotations

# That the tiny model has.
POSITIONS = 128
QUESTION = "Who sat on the log?"


def short(*more):
    return ("generate", "--prompt", QUESTION, "--max-new-tokens", 12, *more)
