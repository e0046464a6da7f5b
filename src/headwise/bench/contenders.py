"""Contenders: kept ratios and policies by name -> the caches that are compared, each with its name in the tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from headwise.errors import ConfigurationError
from headwise.policies import H2O, Auto, FastGen, Full, Policy, Random, StreamingLLM, Window
from headwise.policies.less import Less
from headwise.policies.words import in_bits

STOCK, QUANTIZED, HEADWISE, KVPRESS = "stock", "quantized", "headwise", "kvpress"
FULL = "full"
ALONE = "model alone"

_SINKS = 4

# A share of the prompt, and the prompt's length -> a policy that keeps that much of it.
_POLICIES: dict[str, Callable[[float, int], Policy]] = {
    "h2o": lambda keep, _: H2O(heavy=keep / 2, recent=keep / 2),
    # As a share that leaves room for the sinks: at least one token is rounded up to.
    "streamingllm": lambda keep, context: StreamingLLM(max(0.5, keep * context - _SINKS) / context, _SINKS),
    "window": lambda keep, _: Window(keep),
    "random": lambda keep, _: Random(keep),
}


@dataclass(frozen=True)
class Contender:
    """One cache to measure.

    Attributes:
        kind: "stock", "quantized", "headwise" or "kvpress".
        policy: of a headwise cache.
        backend: of a quantized cache, or the press of kvpress.
        keep: the share of the prompt that was asked for; None where the policy decides by itself.
        graph: whether its decode step is captured in a CUDA graph.
        rows: dtype of exact rows; None for the model's.
        alone: whether it reads a single token, so that its steps are the model's own work.
    """

    name: str
    kind: str
    policy: Policy | None = None
    backend: str | None = None
    keep: float | None = None
    graph: bool = False
    rows: torch.dtype | None = None
    alone: bool = False

    @property
    def coded(self) -> bool:
        """Whether older rows are codes."""
        return self.policy is not None and self.policy.precision is not None

    @property
    def evicts(self) -> bool:
        """Whether it is a headwise cache that drops anything."""
        return self.policy is not None and not isinstance(self.policy.chooser, Full)

    @property
    def setting(self) -> str:
        """What it is, in a few words."""
        if self.policy is not None:
            return str(self.policy) if self.rows is None else f"{self.policy}, rows in {dtype_name(self.rows)}"
        return {STOCK: "DynamicCache, sdpa", QUANTIZED: f"QuantizedCache({self.backend!r})"}.get(
            self.kind, str(self.backend)
        )


@dataclass(frozen=True)
class ContenderOptions:
    """What the command line asks for: which caches are compared, whatever the length of the prompt.

    Attributes:
        policy: name of what keeps a given share of the prompt.
        keeps: those shares.
        recoveries: of FastGen.
        rows: dtypes of exact rows that every headwise cache runs with too.
        bits: formats of older rows, such as "int8", that it runs with too.
        graph: whether every headwise cache runs with a captured step too.
        less: whether all that evict run with LESS too.
        kernels: folder of its kernels; None for those that come with headwise.
        backend: of transformers' quantized cache; None to leave that out.
        press: of kvpress; None to leave that out.

    Raises:
        ConfigurationError: for a policy that cannot be told how much to keep.
    """

    policy: str
    keeps: Sequence[float]
    recoveries: Sequence[float] = ()
    rows: Sequence[torch.dtype] = ()
    bits: Sequence[str] = ()
    graph: bool = False
    less: bool = False
    kernels: Path | None = None
    backend: str | None = None
    press: str | None = None

    def __post_init__(self) -> None:
        check_policy(self.policy)

    def at(self, context: int) -> list[Contender]:
        """All of them, for prompts of that length.

        Raises:
            ConfigurationError: for bits that there are not.
        """
        ours = self._ours(context)
        return [
            stock(),
            *([quantized(self.backend)] if self.backend else []),
            *ours,
            *(kvpress(self.press, share) for share in self.keeps if self.press),
            *(with_less(one, self.kernels) for one in ours if self.less and one.evicts),
        ]

    def _ours(self, context: int) -> list[Contender]:
        """headwise's, without LESS."""
        exact = [
            full(),
            *(keeping(self.policy, share, context) for share in self.keeps),
            *(fastgen(share) for share in self.recoveries),
        ]
        plain = [
            *exact,
            *(with_row_dtype(one, dtype) for dtype in self.rows for one in exact),
            *(with_bits(one, word) for word in self.bits for one in exact),
        ]
        return [*plain, *(with_graph(one) for one in plain if self.graph)]


def stock() -> Contender:
    """What everything is compared with: transformers' own cache with `sdpa`."""
    return Contender("stock", STOCK)


def quantized(backend: str) -> Contender:
    """transformers' quantized cache."""
    return Contender(f"quantized {backend}", QUANTIZED, backend=backend)


def full() -> Contender:
    """headwise, keeping everything."""
    return Contender(FULL, HEADWISE, Full(), keep=1.0)


def alone() -> Contender:
    """What a step takes whatever the cache is: headwise with next to nothing in it."""
    return Contender(ALONE, HEADWISE, Full(), keep=0.0, alone=True)


def auto(ratio: float) -> Contender:
    """headwise with `Auto` by gates, which share so many bytes among rows and bits."""
    return Contender(auto_name(ratio), HEADWISE, Auto(ratio=ratio, gate=True), keep=ratio)


def keeping(policy: str, keep: float, context: int) -> Contender:
    """headwise, keeping that share of a prompt of that length.

    Raises:
        ConfigurationError: for a policy that cannot be told how much to keep.
    """
    check_policy(policy)
    return Contender(keep_name(keep), HEADWISE, _POLICIES[policy](keep, context), keep=keep)


def fastgen(recovery: float) -> Contender:
    """headwise with FastGen, which decides by itself how much to keep."""
    return Contender(f"FastGen {recovery:g}", HEADWISE, FastGen(recovery))


def kvpress(press: str, keep: float) -> Contender:
    """kvpress, keeping that share."""
    return Contender(f"kvpress {percent(keep)}", KVPRESS, backend=press, keep=keep)


def with_graph(contender: Contender) -> Contender:
    """The same, its decode step captured in a CUDA graph."""
    return replace(contender, name=f"{contender.name}, graph", graph=True)


def with_less(contender: Contender, kernels: Path | None) -> Contender:
    """The same, with LESS.

    Args:
        kernels: their folder; None for those that come with headwise.
    """
    assert contender.policy is not None
    return replace(contender, name=f"{contender.name}, LESS", policy=Less(contender.policy, kernels))


def with_row_dtype(contender: Contender, rows: torch.dtype) -> Contender:
    """The same, with exact rows in that dtype."""
    return replace(contender, name=f"{contender.name}, {dtype_name(rows)}", rows=rows)


def with_bits(contender: Contender, bits: str) -> Contender:
    """The same, with older rows in so many bits.

    Args:
        bits: int8, int4, or apart for keys and values, such as k8v4.

    Raises:
        ConfigurationError: for others.
    """
    assert contender.policy is not None
    return replace(contender, name=f"{contender.name}, {bits}", policy=in_bits(contender.policy, bits))


def check_policy(name: str) -> None:
    """Refuse a policy that cannot be told how much to keep.

    Raises:
        ConfigurationError: with the names there are.
    """
    if name not in _POLICIES:
        raise ConfigurationError(f"--policy must be one that keeps a given share: {', '.join(_POLICIES)}; got {name!r}")


def check_names(contenders: Sequence[Contender]) -> tuple[Contender, ...]:
    """The contenders, if no two have the same name.

    Raises:
        ConfigurationError: with the name.
    """
    names = [contender.name for contender in contenders]
    for name in names:
        if names.count(name) > 1:
            raise ConfigurationError(f"{name!r} is given twice")
    return tuple(contenders)


def dtype_name(dtype: torch.dtype) -> str:
    """As options and tables have it."""
    return str(dtype).removeprefix("torch.")


def auto_name(ratio: float) -> str:
    """How the tables call it."""
    return f"Auto {percent(ratio)}"


def keep_name(keep: float) -> str:
    """How the tables call a headwise cache of that share."""
    return f"keep {percent(keep)}"


def percent(share: float) -> str:
    """A share for people, without needless digits."""
    return f"{round(share * 100, 3):g}%"
