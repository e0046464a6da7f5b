"""Words: numbers of a report -> what they say, wherever it is said."""

from __future__ import annotations

from headwise.units import format_bytes


def remembered_words(memory_bytes: int, weight_bytes: int) -> str:
    """What LESS takes."""
    state, weights = format_bytes(memory_bytes), format_bytes(weight_bytes)
    return f"{state} of it for evicted tokens; kernels {weights}, shared by all caches"


def mended_words(before: float, after: float) -> str:
    """How far outputs are off, as a share of their size."""
    return f"{after:.2%} on average, {before:.2%} before rows were refitted"
