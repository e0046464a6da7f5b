"""GPU parts: a setting -> cases for the runner of `tools/gpu.py`: those that go wrong, and some of every real part."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from on_gpu.cases import Case, Wrong

ROOT = Path(__file__).resolve().parents[1]


def fine():
    return {"answer": 42}


def crashes():
    sys.stderr.write("about to crash\n")
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGSEGV)


def sleeps():
    time.sleep(600)


def is_wrong():
    raise Wrong("off by one", largest_error=1.0)


def raises():
    raise ValueError("no such thing")


def troubled(setting):
    found = {"first": fine, "crash": crashes, "second": fine, "hang": sleeps, "wrong": is_wrong, "error": raises}
    return [Case(name, run) for name, run in {**found, "last": fine}.items()]


def few(setting):
    return [Case(name, fine) for name in "abc"]


def slow(setting):
    def told():
        setting.tell({"targets": [{"name": "half-way", "target": ">= 1", "verdict": "met", "shown": "2"}]})
        sleeps()

    return [Case("first", fine), Case("endless", told), Case("never", fine)]


def broken(setting):
    raise RuntimeError("cannot even begin")


def dies_at_the_start(setting):
    """Once its first case is through."""
    if Path(os.environ["GPU_PARTS_MARK"]).exists():
        raise RuntimeError("no device any more")

    def first():
        Path(os.environ["GPU_PARTS_MARK"]).touch()
        os.kill(os.getpid(), signal.SIGKILL)

    return [Case("first", first), Case("second", fine)]


def some_of_all(setting):
    """What imports every part, and runs a case or two of each."""
    from on_gpu import kernels, machine, memory, speed, tokens

    from headwise.bench import bandwidth

    bandwidth._BUFFER_BYTES = 2**16
    # Those that do not take long.
    parts = (machine, 0, 3), (kernels, 1, 3), (tokens, 0, 1), (memory, 1, 2), (speed, 4, 5)
    return [case for part, first, last in parts for case in part.cases(setting)[first:last]]
