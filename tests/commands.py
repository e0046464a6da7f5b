"""The command line as tests call it: arguments in, exit code and both outputs out."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from dataclasses import dataclass

import pytest
from jaxtyping import config as shape_checks

from headwise.cli.main import main


@dataclass
class Answer:
    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


def call(*arguments, stdin=None):
    """Run a command in this process, without the checks of shapes: they take most of the time of a tiny model.

    Args:
        stdin: bytes that it finds on standard input; None leaves that alone.
    """
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(shape_checks, "jaxtyping_disable", True)
        if stdin is not None:
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
    return Answer(left.value.code, out.getvalue(), err.getvalue())


def assert_one_line(answer, says):
    """The command was refused with one line that says so."""
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("error: ")
    assert answer.err.count("\n") == 1
    assert says in answer.err
    assert "Traceback" not in answer.err
