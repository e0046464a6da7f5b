"""Figures: a record -> the numbers that expectations are about; None where what one is about was not run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import median

import torch

from headwise.bench.contenders import ALONE, FULL, HEADWISE, dtype_name
from headwise.bench.record import OUT_OF_MEMORY, Measurement, Record, Result

# A ratio to what could not run at all; JSON has no infinity.
BOUNDLESS = 1e9

# Contexts from which the decode kernel is expected to be as fast as memory.
_KERNEL_CONTEXT = 1024


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


def kernel_time(batch: int, context: int, dtype: torch.dtype, name: str) -> Callable[[Record], float | None]:
    """Seconds of the decode kernel over what a contender keeps, against those over full exact rows."""

    def of(record: Record) -> float | None:
        seconds = {
            measurement.name: measurement.kernel_speed.bytes / measurement.kernel_speed.median
            for result, measurement in _measured(record, dtype)
            if (result.configuration.batch, result.configuration.context) == (batch, context)
            and measurement.kernel_speed is not None
        }
        return seconds[name] / seconds[FULL] if name in seconds and FULL in seconds else None

    return of


def step_over(
    batch: int, context: int, dtype: torch.dtype, name: str | None, base: str
) -> Callable[[Record], float | None]:
    """Seconds of a contender's step, or of the slowest one's, against another's: the median over the rounds of both."""

    def of(record: Record) -> float | None:
        for result in record.results:
            configuration, other = result.configuration, result.own if base == ALONE else result.find(base)
            if (configuration.batch, configuration.context, configuration.dtype) != (batch, context, dtype):
                continue
            if other is None or not other.round_seconds:
                continue
            ratios = [
                median(ours / its for ours, its in zip(each.round_seconds, other.round_seconds, strict=False))
                for each in result.measurements
                if each.kind == HEADWISE and each.round_seconds and each.name != base
                if name is None or each.name == name
            ]
            return max(ratios, default=None)
        return None

    return of


def bound_share(batch: int, context: int, dtype: torch.dtype, name: str) -> Callable[[Record], float | None]:
    """What a contender's step takes at least, over what it takes."""

    def of(record: Record) -> float | None:
        for result, measurement in _measured(record, dtype):
            configuration = result.configuration
            if (configuration.batch, configuration.context, measurement.name) == (batch, context, name):
                return result.bound_share(measurement)
        return None

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
