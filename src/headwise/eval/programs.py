"""Programs: Python source -> whether it runs to its end, in another process with limits. Not a security sandbox."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from headwise.errors import ConfigurationError

# Limits are set inside the child: what runs between fork and exec may hang in a process with threads.
_GUARD = """
import resource, runpy, sys
path, token, seconds, memory, output = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
for kind, limit in (("CPU", seconds), ("AS", memory), ("FSIZE", output), ("CORE", 0)):
    resource.setrlimit(getattr(resource, f"RLIMIT_{kind}"), (limit, limit))
sys.argv = [path]
runpy.run_path(path, run_name="__main__")
print(token, file=sys.__stdout__)
"""


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        seconds: of wall time, and of processor time.
        memory_bytes: of address space.
        output_bytes: of everything it writes into a file, its standard output among it.
    """

    seconds: int = 10
    memory_bytes: int = 2**30
    output_bytes: int = 2**20


def check_can_run(limits: Limits) -> None:
    """Refuse to run programs where they cannot be limited.

    Raises:
        ConfigurationError: when even an empty program does not run within the limits.
    """
    if importlib.util.find_spec("resource") is None or not runs("", limits):
        raise ConfigurationError(f"generated code cannot be run here: this system, or Python, fails under {limits}")


def runs(source: str, limits: Limits) -> bool:
    """Whether the program ends by itself, at its last line, within the limits.

    It runs in a process of its own, in an empty folder, without this process's environment. Its time, memory and
    output are limited and nothing else is: it can read, write and delete what the user can, and reach the network.
    Run only what you would run yourself, or on a machine that holds nothing of value. Unix only.
    """
    # Printed by the guard at the end: a program that leaves early with exit code 0 does not pass.
    token = secrets.token_hex()
    with tempfile.TemporaryDirectory() as folder:
        program, output = Path(folder) / "program.py", Path(folder) / "output"
        program.write_text(source, encoding="utf-8", errors="replace")
        numbers = (limits.seconds, limits.memory_bytes, limits.output_bytes)
        command = [sys.executable, "-I", "-B", "-c", _GUARD, str(program), token, *(str(number) for number in numbers)]
        with output.open("wb") as written:
            code = _wait(command, folder, written.fileno(), limits.seconds)
        return code == 0 and output.read_bytes().rstrip().endswith(token.encode())


def _wait(command: list[str], folder: str, output: int, seconds: int) -> int | None:
    """Exit code of the command; None when it took too long."""
    child = subprocess.Popen(
        command,
        cwd=folder,
        env={},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        return child.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end_group(child)


def _end_group(child: subprocess.Popen[bytes]) -> None:
    """End the child and whatever it has started in its process group."""
    # Mostly nobody is left, which macOS calls a lack of permission.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
