"""Expectations: a record -> each thing that was promised of headwise, met, missed or not run.

They are benchmarks, not tests: they were written for one machine and model, and judge what was run all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from headwise.bench.contenders import ALONE, FULL, auto_name, dtype_name, keep_name
from headwise.bench.figures import (
    BOUNDLESS,
    bound_share,
    kernel_share,
    kernel_time,
    outlives_full,
    peak_excess,
    prefill_excess,
    speedup,
    step_over,
)
from headwise.bench.plan import GPU_SIZES
from headwise.bench.record import EXACT, FASTGEN, GATES, LAST, REPETITION, Record

MET, MISSED, NOT_RUN = "met", "missed", "not run"

WRITTEN_FOR = {
    "cpu": "the default model (SmolLM2-135M), float32, 2 CPU cores with AVX2 or AVX-512 VNNI, --policy h2o",
    "cuda": "Llama-3-8B's shape, bfloat16, one data-centre GPU, --policy h2o",
}


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
    expected = cpu(record.machine.get("instructions")) if device == "cpu" else gpu() if device == "cuda" else ()
    return [expectation.judge(record) for expectation in expected]


def cpu(instructions: str | None = None) -> tuple[Expectation, ...]:
    """What is expected of a CPU.

    Args:
        instructions: the vector instructions that the kernels use; where they multiply codes as they are, more is
            expected of rows in codes.
    """
    dtype, half = torch.float32, keep_name(0.5)
    int8, int4 = (0.28, 0.24) if instructions == "avx512" else (0.4, 0.38)
    small, many = (1, 4096), (8, 4096)

    def excess(look: str, bound: float) -> Expectation:
        return Expectation(f"prefill with {look}, beyond stock's", bound, False, "%", prefill_excess(dtype, look))

    def time(rows: str, bound: float) -> Expectation:
        title = f"decode kernel, batch 8, context 4,096, rows in {rows}, time against fp32"
        return Expectation(title, bound, False, "x", kernel_time(*many, dtype, f"{FULL}, {rows}"))

    return (
        *(excess(look, 0.08) for look in (EXACT, FASTGEN, GATES)),
        excess(LAST, 0.02),
        excess(REPETITION, 0.6),
        Expectation("peak of prefill over held bytes and stock's needs", 1.0, False, "layers", peak_excess(dtype)),
        Expectation(
            "decode kernel, batch 8, context 4,096, of ceiling", 0.65, True, "%", kernel_share(8, dtype, context=4096)
        ),
        time("bfloat16", 0.55),
        time("int8", int8),
        time("int4", int4),
        Expectation(
            f"step, batch 8, context 4,096, {auto_name(0.125)}, against the model alone",
            1.1,
            False,
            "x",
            step_over(*many, dtype, auto_name(0.125), ALONE),
        ),
        Expectation(
            "step, batch 1, context 4,096, slowest policy against full",
            1.0,
            False,
            "x",
            step_over(*small, dtype, None, FULL),
        ),
        Expectation(
            f"step, batch 1, context 4,096, {half}, bound over it", 0.95, True, "%", bound_share(*small, dtype, half)
        ),
        Expectation(
            f"decode, batch 1, context 512, {half}, against stock", 1.05, True, "x", speedup(1, 512, dtype, half)
        ),
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
