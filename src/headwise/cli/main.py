"""Main: the arguments of the command line -> a command run, and an exit code; errors take one line."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer

from headwise.cli.bench import bench
from headwise.cli.bench_vllm import bench_vllm
from headwise.cli.chat import chat
from headwise.cli.compare import compare
from headwise.cli.doctor import doctor
from headwise.cli.eval import evaluations
from headwise.cli.exit_codes import BAD_INPUT, BROKEN_PIPE, INTERRUPTED
from headwise.cli.fit import fit
from headwise.cli.generate import generate
from headwise.cli.inspect import inspect
from headwise.cli.invocation import words
from headwise.cli.lm_eval import SETTINGS, lm_eval
from headwise.cli.policies import policies
from headwise.cli.profile import profile
from headwise.cli.profile_heads import profile_heads
from headwise.cli.results import results
from headwise.cli.train_gate import train_gate
from headwise.cli.train_less import train_less
from headwise.errors import HeadwiseError
from headwise.version import __version__

# The base of typer's complaints about arguments, which has no public name.
_UsageError: type[typer.BadParameter] = typer.BadParameter.__bases__[0]

app = typer.Typer(
    name="headwise",
    help="Shrink the KV cache of a Hugging Face language model head by head, and see what it saves.",
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"headwise {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


app.command()(generate)
app.command()(chat)
app.command()(profile)
app.command()(inspect)
app.command()(fit)
app.command()(policies)
app.command()(doctor)
app.command()(bench)
app.command("bench-vllm")(bench_vllm)
app.add_typer(evaluations)
app.command()(compare)
app.command()(results)
app.command("train-less")(train_less)
app.command("train-gate")(train_gate)
app.command("profile-heads")(profile_heads)
app.command("lm-eval", context_settings=SETTINGS)(lm_eval)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code.

    Args:
        arguments: those after the program's name; default, the ones it was started with.

    Raises:
        SystemExit: always; 0 when all went well, 2 for bad input, 130 when interrupted.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        # A model may write what the terminal's encoding cannot; better a question mark than a broken run.
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # other kinds of stream lack it
    words.set(tuple(given))
    try:
        with _former_names_said():
            code = _run(given or ["--help"])
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read the output has seen enough. Python would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = BROKEN_PIPE
    sys.exit(code)


@contextlib.contextmanager
def _former_names_said() -> Iterator[None]:
    """A word of the command line that has another name now works, and its name is said in one line."""
    with warnings.catch_warnings():
        warnings.filterwarnings("always", message="policy .* is now called", category=DeprecationWarning)
        show, told = warnings.showwarning, set[str]()

        def say(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
            if not issubclass(category, DeprecationWarning):
                show(message, category, *rest, **more)
            elif str(message) not in told:
                told.add(str(message))
                typer.echo(f"note: {message}", err=True)

        warnings.showwarning = say
        yield


def _run(arguments: list[str]) -> int:
    try:
        result = app(arguments, prog_name="headwise", standalone_mode=False)
    except HeadwiseError as error:
        return _complain(str(error), BAD_INPUT)
    except _UsageError as error:
        return _complain(error.format_message(), BAD_INPUT)
    except (KeyboardInterrupt, typer.Abort):
        result = INTERRUPTED
    # Commands return nothing; a number is the exit code of one that left early.
    code = result if isinstance(result, int) else 0
    return _complain("interrupted", code) if code == INTERRUPTED else code


def _complain(message: str, code: int) -> int:
    line = " ".join(message.split())
    typer.echo(line if code == INTERRUPTED else f"error: {line}", err=True)
    return code


if __name__ == "__main__":
    main()
