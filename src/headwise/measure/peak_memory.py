"""Peak memory: a block of code -> the bytes it had allocated at its highest, beyond what was there before."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch


@dataclass
class Peak:
    """The answer, once the block has ended.

    Attributes:
        bytes: None while it runs, when it failed, and on a device that does not tell.
        left: what of it was still allocated at the end; None likewise.
    """

    bytes: int | None = None
    left: int | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Count what torch allocates in the block: to the byte, and without slowing it measurably.

    On a GPU the allocator keeps the count. On a CPU the profiler notes every allocation of tensors; what
    libraries take from the system behind torch's back is not in it, for any candidate.
    """
    found = Peak()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        torch.cuda.synchronize(device)
        found.bytes = torch.cuda.max_memory_allocated(device) - before
        found.left = torch.cuda.memory_allocated(device) - before
    elif device.type == "cpu":
        profiler = torch.autograd.profiler.profile(use_kineto=False, profile_memory=True)
        with _silence():
            profiler.__enter__()
        try:
            yield found
        finally:
            with _silence():
                profiler.__exit__(None, None, None)
        results = profiler.kineto_results
        assert results is not None
        sizes = [e.nbytes() for e in results.events() if e.name() == "[memory]"]  # type: ignore[attr-defined]  # not in its stub
        found.bytes, found.left = max(accumulate(sizes, initial=0)), sum(sizes)
    else:
        yield found


@contextmanager
def _silence() -> Iterator[None]:
    """Without what the profiler's library writes to standard error behind Python's back when it starts and stops."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
