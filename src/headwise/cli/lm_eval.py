"""lm-eval: the arguments of lm-evaluation-harness -> its own command line, with the model `headwise` known to it."""

from __future__ import annotations

import importlib
import sys
from typing import Annotated

import typer

from headwise.errors import ConfigurationError

# Everything is the harness's to read, its --help included.
SETTINGS = {"ignore_unknown_options": True, "help_option_names": []}


def lm_eval(arguments: Annotated[list[str] | None, typer.Argument(metavar="ARGUMENTS")] = None) -> None:
    """Run lm-evaluation-harness: all arguments are its own, and --model headwise is a model it knows.

    For example: headwise lm-eval --model headwise --model_args policy=fastgen,recovery=0.95 --tasks arc_easy
    """
    try:
        importlib.import_module("headwise.eval.lm_harness")
        harness = importlib.import_module("lm_eval.__main__")
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"lm-evaluation-harness is not complete ({error}): pip install 'headwise[lm-eval]'"
        ) from error
    # The harness offers no other way in.
    sys.argv = ["headwise lm-eval", *(arguments or ())]
    harness.cli_evaluate()
