"""Expectations: a record -> each thing that was promised of headwise, met, missed or not run.

They are benchmarks, not tests: they were written for one machine and model, and judge what was run all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

from headwise.bench.contenders import FULL, HEADWISE, dtype_name, keep_name
from headwise.bench.plan import GPU_SIZES
from headwise.bench.record import EXACT, OUT_OF_MEMORY, Measurement, Record, Result

MET, MISSED, NOT_RUN = "met", "missed", "not run"

WRITTEN_FOR = {
    "cpu": "the default model (SmolLM2-135M), float32, 2 CPU cores, --policy h2o",
    "cuda": "Llama-3-8B's shape, bfloat16, one data-centre GPU, --policy h2o",
}

# A ratio to what could not run at all; JSON has no infinity.
BOUNDLESS = 1e9

# Contexts from which the decode kernel is expected to be as fast as memory.
_KERNEL_CONTEXT = 1024


@dataclass(frozen=True)
class Expectation:
    """One figure that was promised.

    Attributes:
        bound: of the figure.
        at_least: whether the figure is to be the bound or more; else the bound or less.
        unit: "x" for a ratio, "%" for a share, or words.
        measure: the figure in a record; None where what it is about was not run.
    """

    name: str
    bound: float
    at_least: bool
    unit: str
    measure: Callable[[Record], float | None]

    def judge(self, record: Record) -> Verdict:
        """Met, missed or not run."""
        measured = self.measure(record)
        if measured is None:
            return Verdict(self.name, self.target, None, NOT_RUN, "")
        met = measured >= self.bound if self.at_least else measured <= self.bound
        return Verdict(self.name, self.target, measured, MET if met else MISSED, self.shown(measured))

    @property
    def target(self) -> str:
        """For people."""
        return f"{'>=' if self.at_least else '<='} {self.shown(self.bound)}"

    def shown(self, figure: float) -> str:
        """The figure with its unit."""
        if figure >= BOUNDLESS:
            return "stock's cache does not fit"
        if self.unit == "%":
            return f"{figure * 100:.3g} %"
        return f"{figure:.2f}{self.unit}" if self.unit == "x" else f"{figure:.2f} {self.unit}"


@dataclass(frozen=True)
class Verdict:
    """What came of an expectation.

    Attributes:
        measured: the figure; None where it was not run.
        verdict: "met", "missed" or "not run".
        shown: the figure for people; empty where there is none.
    """

    name: str
    target: str
    measured: float | None
    verdict: str
    shown: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def judge(record: Record, device: str) -> list[Verdict]:
    """Every expectation for that kind of device, in order; none for kinds that nothing was promised for."""
    return [expectation.judge(record) for expectation in EXPECTATIONS.get(device, ())]


# Figures of a record.


def speedup(batch: int, context: int, dtype: torch.dtype, name: str) -> Callable[[Record], float | None]:
    """Decode speed of a contender against stock: the median over the rounds of both."""

    def of(record: Record) -> float | None:
        for result, measurement in _measured(record, dtype):
            configuration = result.configuration
            if (configuration.batch, configuration.context, measurement.name) == (batch, context, name):
                ratios = result.ratios(measurement)
                return median(ratios) if ratios else None
        return None

    return of


def kernel_share(
    batch: int, dtype: torch.dtype, *, bits: str | None = None, context: int = _KERNEL_CONTEXT
) -> Callable[[Record], float | None]:
    """Bandwidth of the decode kernel against the ceiling: the least over all that was run with enough context.

    Args:
        bits: of the rows, as `with_bits` takes them; None for exact ones.
    """

    def of(record: Record) -> float | None:
        shares = [
            result.kernel_share(measurement)
            for result, measurement in _measured(record, dtype)
            if result.configuration.batch == batch
            and (bits in measurement.name.split(", ") if measurement.coded else bits is None)
            and result.configuration.context >= context
            # What the last-level cache holds does not come from memory.
            and measurement.kernel_speed is not None
            and measurement.kernel_speed.beyond_cache is not False
        ]
        return min((share for share in shares if share is not None), default=None)

    return of


def peak_excess(dtype: torch.dtype) -> Callable[[Record], float | None]:
    """Prefill's peak beyond what is held and what stock needs besides its cache, in full layers: the most."""

    def of(record: Record) -> float | None:
        excess = [result.excess_layers(measurement, record.layers) for result, measurement in _measured(record, dtype)]
        return max((layers for layers in excess if layers is not None), default=None)

    return of


def profile_share(dtype: torch.dtype, kind: str) -> Callable[[Record], float | None]:
    """Seconds of FastGen's "exact" or "sampled" profile against stock's prefill."""

    def of(record: Record) -> float | None:
        cost = record.profile
        if cost is None or cost.dtype != dtype_name(dtype):
            return None
        return cost.exact_share if kind == "exact" else cost.sampled_share

    return of


def prefill_excess(dtype: torch.dtype, look: str) -> Callable[[Record], float | None]:
    """How much longer than stock's a prefill takes that looks at that."""

    def of(record: Record) -> float | None:
        costs = record.prefills
        return None if costs is None or costs.dtype != dtype_name(dtype) else costs.excess(look)

    return of


def _measured(record: Record, dtype: torch.dtype) -> Iterable[tuple[Result, Measurement]]:
    """Every headwise contender that ran, in results of that dtype."""
    for result in record.results:
        if result.configuration.dtype == dtype:
            for measurement in result.measurements:
                if measurement.kind == HEADWISE and measurement.failure is None:
                    yield result, measurement


def outlives_full(batch: int, context: int, dtype: torch.dtype, name: str) -> Callable[[Record], float | None]:
    """Speed against stock; without limit where stock's full cache does not fit and the contender's does."""
    ratio = speedup(batch, context, dtype, name)

    def of(record: Record) -> float | None:
        for result, measurement in _measured(record, dtype):
            configuration = result.configuration
            if (configuration.batch, configuration.context, measurement.name) == (batch, context, name):
                stock = result.stock
                if stock is not None and stock.failure == OUT_OF_MEMORY and measurement.round_seconds:
                    return BOUNDLESS
        return ratio(record)

    return of


def _cpu() -> tuple[Expectation, ...]:
    dtype = torch.float32
    half, quarter = keep_name(0.5), keep_name(0.25)

    def decode(batch: int, context: int, name: str, bound: float) -> Expectation:
        title = f"decode, batch {batch}, context {context:,}, {name}, against stock"
        return Expectation(title, bound, True, "x", speedup(batch, context, dtype, name))

    return (
        decode(8, 4096, FULL, 2.2),
        decode(8, 4096, half, 3.0),
        decode(8, 4096, quarter, 3.5),
        decode(1, 4096, half, 1.5),
        decode(1, 512, half, 1.0),
        Expectation("decode kernel, batch 8, context 1,024+, of ceiling", 0.7, True, "%", kernel_share(8, dtype)),
        Expectation("exact profile, 2,048 tokens, of stock's prefill", 0.25, False, "%", profile_share(dtype, "exact")),
        Expectation(
            "sampled profile, 2,048 tokens, of stock's prefill", 0.04, False, "%", profile_share(dtype, "sampled")
        ),
        Expectation("peak of prefill over held bytes and stock's needs", 1.5, False, "layers", peak_excess(dtype)),
    )


def gpu(dtype: torch.dtype = torch.bfloat16, sizes: tuple[tuple[int, int], ...] = GPU_SIZES) -> tuple[Expectation, ...]:
    """What is expected of a GPU.

    Args:
        sizes: batch and context of one short sequence, of some, and of many.
    """
    half, quarter = keep_name(0.5), keep_name(0.25)
    one, some, many = sizes

    def decode(size: tuple[int, int], name: str, bound: float) -> Expectation:
        title = f"decode, batch {size[0]}, context {size[1]:,}, {name}, against stock"
        return Expectation(title, bound, True, "x", speedup(*size, dtype, name))

    def kernel(bits: str | None, bound: float) -> Expectation:
        share = kernel_share(some[0], dtype, bits=bits, context=some[1])
        title = f"decode kernel, batch {some[0]}, context {some[1]:,}+, {bits or dtype_name(dtype)}, of copy"
        return Expectation(title, bound, True, "%", share)

    return (
        decode(some, f"{half}, graph", 3.0),
        decode(some, half, 1.2),
        kernel(None, 0.75),
        kernel("int8", 0.6),
        kernel("int4", 0.5),
        Expectation(
            f"decode, batch {many[0]}, context {many[1]:,}, {quarter}, graph, against stock, or stock does not fit",
            4.0,
            True,
            "x",
            outlives_full(*many, dtype, f"{quarter}, graph"),
        ),
        decode(one, half, 1.0),
        Expectation(f"prefill with {EXACT}, beyond stock's", 0.15, False, "%", prefill_excess(dtype, EXACT)),
    )


EXPECTATIONS = {"cpu": _cpu(), "cuda": gpu()}
