"""Memory: this process -> bytes that it holds, once what is free has gone back to the system."""

from __future__ import annotations

import ctypes
import gc
import os


def resident_bytes() -> int:
    """What is resident after a collection."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE")
