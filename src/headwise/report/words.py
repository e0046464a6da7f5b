"""Words: numbers of a report -> what they say, wherever it is said."""

from __future__ import annotations

from headwise.policies.base import Policy
from headwise.policies.choice import Again
from headwise.units import format_bytes


def remembered_words(memory_bytes: int, weight_bytes: int) -> str:
    """What LESS takes."""
    state, weights = format_bytes(memory_bytes), format_bytes(weight_bytes)
    return f"{state} of it for evicted tokens; kernels {weights}, shared by all caches"


def asked_words(policy: Policy, again: Again | None) -> str | None:
    """What a policy with a size is to keep, and when it chooses; None for one without.

    Args:
        again: how it chooses when more tokens have come; None where it does not.
    """
    given = policy.parameters()
    kind, size = next(
        ((n, given[n]) for n in ("keep", "ratio", "bytes", "recovery") if given.get(n) is not None), ("", 0)
    )
    if not kind or "of" not in given:
        return None
    once = policy.needs_evidence and again is None
    whole = "the prompt" if once or given["of"] == "prompt" else "all tokens seen"
    if kind == "bytes":
        words = f"{format_bytes(int(size))} for each sequence"  # type: ignore[call-overload]  # a count
    elif kind == "recovery":
        words = f"all that a query pays {1 - float(size):.3g} of its attention"  # type: ignore[arg-type]  # a number
    elif isinstance(size, float):
        words = f"{size:.1%} of {'the bytes of ' if kind == 'ratio' else ''}{whole}"
    else:
        words = f"{size:,} tokens of each head{', or their bytes' if kind == 'ratio' else ''}"
    if again is not None:
        words += f", chosen again every {again.every} tokens{' or more' if again.size is not None else ''}"
    return f"{words}, chosen once" if once else words


def mended_words(before: float, after: float) -> str:
    """How far outputs are off, as a share of their size."""
    return f"{after:.2%} on average, {before:.2%} before rows were refitted"
