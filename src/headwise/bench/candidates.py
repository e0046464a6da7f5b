"""Candidates: kept ratios and policies by name -> the caches that compete, each with the name the tables show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from headwise.errors import ConfigurationError
from headwise.policies import H2O, FastGen, Full, Policy, Random, StreamingLLM, Window
from headwise.policies.less import Less
from headwise.policies.words import in_bits

STOCK, QUANTIZED, HEADWISE, KVPRESS = "stock", "quantized", "headwise", "kvpress"
FULL = "full"

_SINKS = 4

# A share of the prompt, and the prompt's length -> a policy that keeps that much of it.
_KEEPERS: dict[str, Callable[[float, int], Policy]] = {
    "h2o": lambda keep, _: H2O(heavy=keep / 2, recent=keep / 2),
    # As a share that leaves room for the sinks: at least one token is rounded up to.
    "streamingllm": lambda keep, context: StreamingLLM(max(0.5, keep * context - _SINKS) / context, _SINKS),
    "window": lambda keep, _: Window(keep),
    "random": lambda keep, _: Random(keep),
}


@dataclass(frozen=True)
class Candidate:
    """One cache to measure.

    Attributes:
        kind: "stock", "quantized", "headwise" or "kvpress".
        policy: of a headwise cache.
        backend: of a quantized cache, or the press of kvpress.
        keep: the share of the prompt that was asked for; None where the candidate decides by itself.
        graph: whether its decode step is captured in a CUDA graph.
        rows: dtype of exact rows; None for the model's.
    """

    name: str
    kind: str
    policy: Policy | None = None
    backend: str | None = None
    keep: float | None = None
    graph: bool = False
    rows: torch.dtype | None = None

    @property
    def coded(self) -> bool:
        """Whether older rows are codes."""
        return self.policy is not None and self.policy.precision is not None

    @property
    def setting(self) -> str:
        """What it is, in a few words."""
        if self.policy is not None:
            return str(self.policy) if self.rows is None else f"{self.policy}, rows in {dtype_name(self.rows)}"
        return {STOCK: "DynamicCache, sdpa", QUANTIZED: f"QuantizedCache({self.backend!r})"}.get(
            self.kind, str(self.backend)
        )


def stock() -> Candidate:
    """What everything is compared with: transformers' own cache with `sdpa`."""
    return Candidate("stock", STOCK)


def quantized(backend: str) -> Candidate:
    """transformers' quantized cache."""
    return Candidate(f"quantized {backend}", QUANTIZED, backend=backend)


def full() -> Candidate:
    """headwise, keeping everything."""
    return Candidate(FULL, HEADWISE, Full(), keep=1.0)


def kept(policy: str, keep: float, context: int) -> Candidate:
    """headwise, keeping that share of a prompt of that length.

    Raises:
        ConfigurationError: for a policy that cannot be told how much to keep.
    """
    check_policy(policy)
    return Candidate(keep_name(keep), HEADWISE, _KEEPERS[policy](keep, context), keep=keep)


def check_policy(name: str) -> None:
    """Refuse a policy that cannot be told how much to keep.

    Raises:
        ConfigurationError: with the names there are.
    """
    if name not in _KEEPERS:
        raise ConfigurationError(f"--policy must be one that keeps a given share: {', '.join(_KEEPERS)}; got {name!r}")


def captured(candidate: Candidate) -> Candidate:
    """The same, its decode step captured in a CUDA graph."""
    return replace(candidate, name=f"{candidate.name}, graph", graph=True)


def remembering(candidate: Candidate, kernels: Path | None) -> Candidate:
    """The same, with LESS.

    Args:
        kernels: their folder; None for those that come with headwise.
    """
    assert candidate.policy is not None
    return replace(candidate, name=f"{candidate.name}, LESS", policy=Less(candidate.policy, kernels))


def in_rows(candidate: Candidate, rows: torch.dtype) -> Candidate:
    """The same, with exact rows in that dtype."""
    return replace(candidate, name=f"{candidate.name}, {dtype_name(rows)}", rows=rows)


def coded(candidate: Candidate, bits: str) -> Candidate:
    """The same, with older rows in so many bits.

    Args:
        bits: int8, int4, or apart for keys and values, such as k8v4.

    Raises:
        ConfigurationError: for others.
    """
    assert candidate.policy is not None
    return replace(candidate, name=f"{candidate.name}, {bits}", policy=in_bits(candidate.policy, bits))


def recovering(recovery: float) -> Candidate:
    """headwise with FastGen, which decides by itself how much to keep."""
    return Candidate(f"FastGen {recovery:g}", HEADWISE, FastGen(recovery))


def pressed(press: str, keep: float) -> Candidate:
    """kvpress, keeping that share."""
    return Candidate(f"kvpress {percent(keep)}", KVPRESS, backend=press, keep=keep)


def dtype_name(dtype: torch.dtype) -> str:
    """As options and tables have it."""
    return str(dtype).removeprefix("torch.")


def keep_name(keep: float) -> str:
    """How the tables call a headwise cache of that share."""
    return f"keep {percent(keep)}"


def percent(share: float) -> str:
    """A share for people, without needless digits."""
    return f"{round(share * 100, 3):g}%"


def check_names(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """The candidates, if no two have the same name.

    Raises:
        ConfigurationError: with the name.
    """
    names = [candidate.name for candidate in candidates]
    for name in names:
        if names.count(name) > 1:
            raise ConfigurationError(f"{name!r} is given twice")
    return tuple(candidates)
