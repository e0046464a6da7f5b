"""Plan: options of the command line, or the targets -> configurations to run, checked before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from headwise.bench.contenders import (
    Contender,
    auto,
    check_names,
    dtype_name,
    fastgen,
    full,
    keeping,
    stock,
    with_bits,
    with_graph,
    with_row_dtype,
)
from headwise.errors import ConfigurationError, InputError
from headwise.types import Tensor

# Tokens of the prompt that is read with everything that can be looked at in it, by the kind of device.
PREFILL_CONTEXT = {"cpu": 4096, "cuda": 8192}

# Batches and contexts that the targets of a GPU are about, and the formats of rows that are codes.
GPU_SIZES = (1, 2048), (8, 8192), (32, 16384)
CODED_BITS = "int8", "int4"

# Rounds of tokens that are fed beside those that count: one warms up, in one attention is timed by itself.
_OTHER_ROUNDS = 2


@dataclass(frozen=True)
class Configuration:
    """One workload and the caches that run it.

    Attributes:
        batch: sequences.
        context: tokens of the prompt.
        distinct: sequences of the prompt that are read; the rest of the batch repeats them.
    """

    batch: int
    context: int
    dtype: torch.dtype
    contenders: tuple[Contender, ...]
    distinct: int

    @property
    def title(self) -> str:
        """For people."""
        return f"batch {self.batch}, context {self.context:,}, {dtype_name(self.dtype)}"


@dataclass(frozen=True)
class Plan:
    """Everything that a run does.

    Attributes:
        steps: tokens that a contender decodes before the next has its turn.
        rounds: turns of every contender that count.
        kernel, evict_every: of every headwise cache.
        prefill_context: tokens of a prompt that is read with everything that can be looked at in it; 0 where none is.
        capture: how steps are captured; None for a CUDA graph.
        keep_going: whether a contender that fails in any way is noted and left out, as one that is out of memory is.
    """

    configurations: tuple[Configuration, ...]
    steps: int
    rounds: int
    kernel: str
    evict_every: int
    prefill_context: int = 0
    capture: Callable[[Callable[[], Tensor]], Callable[[], Tensor]] | None = None
    keep_going: bool = False

    @property
    def new_tokens(self) -> int:
        """What every contender decodes in all."""
        return self.steps * (self.rounds + _OTHER_ROUNDS)

    def round_ids(self, number: int, context: int) -> slice:
        """Columns of the tokens that a round feeds; round 0 warms up, in the one behind the last attention is timed."""
        return slice(context + number * self.steps, context + (number + 1) * self.steps)

    def check_positions(self, positions: int | None) -> None:
        """Refuse contexts that the model has no room for.

        Raises:
            InputError: with the longest that fits.
        """
        longest = max(configuration.context for configuration in self.configurations)
        if positions is not None and longest + self.new_tokens > positions:
            raise InputError(
                f"a context of {longest:,} and {self.new_tokens:,} decoded tokens do not fit into the model's "
                f"{positions:,} positions; the longest context is {max(0, positions - self.new_tokens):,}"
            )

    def cache_bytes(self, row_bytes: Callable[[torch.dtype], int]) -> int:
        """Bytes of the caches that live at the same time, at the most; only an estimate.

        Args:
            row_bytes: what a full cache holds per token of a sequence, by dtype.
        """

        def of(configuration: Configuration) -> float:
            # Those that decide by themselves may keep everything.
            shares = [contender.keep or 1.0 for contender in configuration.contenders]
            tokens = configuration.batch * (configuration.context + self.new_tokens)
            return sum(shares) * tokens * row_bytes(configuration.dtype)

        return math.ceil(max(of(configuration) for configuration in self.configurations))


def grid(
    batches: Sequence[int],
    contexts: Sequence[int],
    dtypes: Sequence[torch.dtype],
    contenders: Callable[[int], Sequence[Contender]],
    distinct: int | None = None,
) -> tuple[Configuration, ...]:
    """Every batch with every context and dtype.

    Args:
        contenders: those for a context.
        distinct: as in `Configuration`, default the whole batch.

    Raises:
        ConfigurationError: for a number out of range or given twice.
    """
    _check_counts("--batch", batches)
    _check_counts("--context", contexts)
    _check_unique("--dtype", [dtype_name(dtype) for dtype in dtypes])
    for batch in batches:
        if distinct is not None and batch % distinct:
            raise ConfigurationError(f"--distinct {distinct} must divide every batch, and does not divide {batch}")
    return tuple(
        Configuration(batch, context, dtype, check_names(contenders(context)), distinct or batch)
        for dtype in dtypes
        for batch in batches
        for context in contexts
    )


def targets(device: str, dtype: torch.dtype, policy: str) -> tuple[Configuration, ...]:
    """What the expectations of that kind of device are about.

    Raises:
        ConfigurationError: for a kind that nothing is expected of.
    """

    def of(
        batch: int, context: int, *keeps: float, distinct: int | None = None, graph: bool = False, bits: bool = False
    ) -> Configuration:
        exact = [full() if keep == 1 else keeping(policy, keep, context) for keep in keeps]
        ours = [*exact, *(with_graph(contender) for contender in exact if graph)]
        ours += [with_bits(contender, word) for word in CODED_BITS for contender in exact if bits]
        return Configuration(batch, context, dtype, (stock(), *ours), distinct or batch)

    if device == "cpu":
        short, long = of(1, 512, 0.5), of(1, 4096, 1.0, 0.5)
        # One sequence stands for all: reading eight takes longer than everything else.
        many = of(8, 4096, 1.0, 0.25, distinct=1)
        rows = [with_row_dtype(full(), torch.bfloat16), *(with_bits(full(), word) for word in CODED_BITS)]
        return (
            short,
            replace(long, contenders=(*long.contenders, fastgen(0.95), auto(0.25))),
            replace(many, contenders=(*many.contenders, *rows, auto(0.125))),
        )
    if device == "cuda":
        # Half a million prompt tokens in one pass would need more memory than the cache; one sequence stands for all.
        single, several, most = GPU_SIZES
        return (of(*single, 0.5), of(*several, 0.5, graph=True, bits=True), of(*most, 0.25, distinct=1, graph=True))
    raise ConfigurationError(f"there are no targets for {device!r}, only for cpu and cuda")


def check_share(name: str, share: float) -> None:
    """Refuse what is no share that can be kept.

    Raises:
        ConfigurationError: for 0 or less, more than 1, or not a number.
    """
    if not 0 < share <= 1:
        raise ConfigurationError(f"{name} must be more than 0 and at most 1, got {share:g}")


def _check_counts(name: str, values: Sequence[int]) -> None:
    for value in values:
        if value < 1:
            raise ConfigurationError(f"{name} must be a count of 1 or more, got {value}")
    _check_unique(name, values)


def _check_unique(name: str, values: Sequence[object]) -> None:
    if not values:
        raise ConfigurationError(f"{name} needs at least one value")
    for index, value in enumerate(values):
        if value in values[:index]:
            raise ConfigurationError(f"{name} {value} is given twice")
