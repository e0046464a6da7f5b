"""Compilation: a model that `torch.compile` traces -> graphs of its own code, with headwise's called between them.

What headwise does depends on what is in its rows, which no graph can hold: traced, it would break in dozens of places
and be compiled again with every length. Left out, a pass has a break where the cache is asked and where attention is
computed, and every step runs what was compiled for the first ones.
"""

from __future__ import annotations

from torch._dynamo import trace_rules

_LEFT_OUT = "headwise"


def leave_out_of_graphs() -> None:
    """Let the compiler call the package as it is.

    A decorator for single functions, `torch.compiler.disable`, would cost every call without a compiler 3 microseconds.
    """
    if not trace_rules.check_file(__file__).skipped:
        trace_rules.add(_LEFT_OUT)
