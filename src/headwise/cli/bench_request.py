"""Bench request: words about a workload and about caches -> the configurations to run, before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from headwise.cli.bench_options import DEFAULT_BATCH, DEFAULT_CONTEXT, DEFAULT_KEEP
from headwise.cli.loading import parse_dtype
from headwise.errors import ConfigurationError

if TYPE_CHECKING:
    import torch

    from headwise.bench.plan import Configuration

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class BenchRequest:
    """Options of `headwise bench` as they were given; None where one was not."""

    batch: str | None
    context: str | None
    distinct: int | None
    keep: str | None
    policy: str
    recovery: str | None
    graph: bool
    bits: str | None
    cache_dtype: str | None
    less: bool
    less_kernels: Path | None
    quantized: str
    kvpress: str | None
    kvpress_press: str
    shape: str | None

    def targets(self, device: torch.device, dtypes: Sequence[torch.dtype]) -> tuple[Configuration, ...]:
        """What the expectations are about.

        Raises:
            ConfigurationError: when anything else was asked for, or nothing is expected of the device.
        """
        from headwise.bench.plan import targets

        self._refuse_all_but_targets()
        if len(dtypes) > 1:
            raise ConfigurationError("--targets takes one --dtype")
        return targets(device.type, dtypes[0], self.policy)

    def grid(self, dtypes: Sequence[torch.dtype], notes: list[str]) -> tuple[Configuration, ...]:
        """Every batch with every context and dtype.

        Args:
            notes: takes a line on what is not installed.

        Raises:
            ConfigurationError: for a word or number that cannot be.
        """
        from headwise.bench.contenders import ContenderOptions
        from headwise.bench.plan import grid
        from headwise.measure.stock_caches import find_backend

        if self.shape is not None and self.recovery is not None:
            raise ConfigurationError("--recovery needs a tokenizer, which a --shape does not have")
        if self.shape is not None and self._with_less:
            raise ConfigurationError("--less needs a model, kernels are trained for one; random weights have none")
        backend, missing = find_backend(self.quantized)
        if missing is not None:
            notes.append(f"quantized: {missing}")
        contenders = ContenderOptions(
            self.policy,
            _shares("--keep", DEFAULT_KEEP if self.keep is None else self.keep),
            [] if self.recovery is None else _shares("--recovery", self.recovery),
            [_row_dtype(name) for name in _words(self.cache_dtype)],
            _words(self.bits),
            self.graph,
            self._with_less,
            self.less_kernels,
            backend,
            self.kvpress and self.kvpress_press,
        )
        batches = _numbers("--batch", DEFAULT_BATCH if self.batch is None else self.batch, int)
        contexts = _numbers("--context", DEFAULT_CONTEXT if self.context is None else self.context, int)
        return grid(batches, contexts, dtypes, contenders.at, self.distinct)

    @property
    def _with_less(self) -> bool:
        return self.less or self.less_kernels is not None

    def _refuse_all_but_targets(self) -> None:
        given = {name: getattr(self, name) for name in ("batch", "context", "distinct", "keep", "recovery", "bits")}
        given |= {"cache_dtype": self.cache_dtype, "less": self._with_less or None, "kvpress": self.kvpress}
        named = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None]
        if named:
            raise ConfigurationError(f"--targets says what to run; leave out {', '.join(named)}")


def resolve_dtypes(text: str, device: torch.device) -> list[torch.dtype]:
    """The dtypes of those names; "auto" is what suits the device.

    Raises:
        ConfigurationError: for another name.
    """
    import torch

    default = torch.float32 if device.type == "cpu" else torch.bfloat16
    return [parse_dtype(name.strip()) or default for name in text.split(",")]


def _words(text: str | None) -> list[str]:
    return [] if text is None else [word.strip() for word in text.split(",")]


def _row_dtype(name: str) -> torch.dtype:
    dtype = parse_dtype(name)
    if dtype is None:
        raise ConfigurationError(
            "--cache-dtype takes float16, bfloat16 or float32 here; rows in the model's always run"
        )
    return dtype


def _shares(name: str, text: str) -> list[float]:
    from headwise.bench.plan import check_share

    shares = _numbers(name, text, float)
    for share in shares:
        check_share(name, share)
    return shares


def _numbers(name: str, text: str, kind: Callable[[str], T]) -> list[T]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ConfigurationError(f"{name} takes numbers with commas between them, got {text!r}") from None
