"""Compare: what was found and what was expected -> the largest differences; `Wrong` where one is more than rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from headwise.kernels.interface import Decoded
from on_gpu.cases import Figures, Wrong

# Of an output in that dtype, and of what follows from the logits alone; the latter also where rows are codes, which
# 16-bit models read as fp16.
OUTPUT = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
LOGITS = 1e-5
CODED_OUTPUT = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 3e-3}
CODED_LOGITS = {torch.float32: 1e-5, torch.bfloat16: 2e-3, torch.float16: 2e-3}


@dataclass(frozen=True)
class Pair:
    """Two tensors that should be equal up to `atol + rtol * |expected|`; exactly where both are 0."""

    name: str
    found: torch.Tensor
    expected: torch.Tensor
    atol: float = 0.0
    rtol: float = 0.0


def compare(pairs: Sequence[Pair]) -> Figures:
    """The largest differences of each pair.

    Raises:
        Wrong: with the same figures, where one differs by more than it may.
    """
    figures, wrong = {}, []
    for pair in pairs:
        if pair.found.shape != pair.expected.shape or pair.found.dtype != pair.expected.dtype:
            shapes = [f"{each.dtype} {tuple(each.shape)}" for each in (pair.found, pair.expected)]
            raise Wrong(f"{pair.name} is {shapes[0]} instead of {shapes[1]}")
        found, expected = pair.found.double(), pair.expected.double()
        # Infinities that are equal differ by nothing.
        apart = (found - expected).abs().where(found != expected, 0)
        size = expected.abs().where(expected.isfinite(), 0)
        # Not "more than": what is not a number is wrong too.
        bad = ~(apart <= pair.atol + pair.rtol * size)
        figures[pair.name] = {
            "largest_error": _largest(apart),
            "largest_relative_error": _largest(apart / size.clamp(min=1e-6)),
            "atol": pair.atol,
            "rtol": pair.rtol,
        }
        if bad.any():
            count, where = int(bad.sum()), bad.nonzero()[0].tolist()
            one, other = found[tuple(where)].item(), expected[tuple(where)].item()
            wrong.append(f"{pair.name}: {count} of {bad.numel()} differ, the first at {where}: {one:g}, not {other:g}")
    if wrong:
        raise Wrong("; ".join(wrong), **figures)
    return figures


def compare_decoded(found: Decoded, expected: Decoded, output: float, logits: float) -> Figures:
    """The same for what came of the attention of a few query rows."""
    pairs = [
        Pair("output", found.output, expected.output, output, output),
        Pair("lse", found.lse, expected.lse, logits, logits),
    ]
    if (found.on_kept is None) != (expected.on_kept is None):
        raise Wrong("probabilities were asked for and not given, or given and not asked for")
    for name in ("on_kept", "on_fresh"):
        own, others = getattr(found, name), getattr(expected, name)
        if own is not None:
            pairs.append(Pair(name, own, others, logits, 10 * logits))
    return compare(pairs)


def _largest(tensor: torch.Tensor) -> float:
    return float(tensor.max()) if tensor.numel() else 0.0
