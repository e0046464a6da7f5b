"""Statistics: one number per item -> their mean, and how far it would lie elsewhere with other items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_LEVEL = 0.95
_RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval.

    Attributes:
        low, high: ends of the 95 % bootstrap interval; None for a single value, which tells nothing about others.
    """

    mean: float
    low: float | None
    high: float | None


def estimate(values: Sequence[float], seed: int) -> Estimate:
    """The mean, and the percentile interval of means of items drawn with replacement (Efron and Tibshirani, ch. 13).

    Args:
        values: one per item, at least one.
        seed: of the draws; equal values and seeds give equal intervals.
    """
    data = np.asarray(values, dtype=np.float64)
    if len(data) == 1:
        return Estimate(float(data[0]), None, None)
    drawn = np.random.default_rng(seed).integers(len(data), size=(_RESAMPLES, len(data)))
    tail = (1 - _LEVEL) / 2
    low, high = np.quantile(data[drawn].mean(axis=1), (tail, 1 - tail))
    return Estimate(float(data.mean()), float(low), float(high))
