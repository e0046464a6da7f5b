"""Fit: sizes of a model, a context, a batch and memory -> what each policy takes there, and which is recommended."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from headwise.measure.sizes import ModelSizes

FULL = "full"

# Of which `Match` holds the queries until rows are chosen.
_QUERIES = 2048
# Tokens that a model is asked about which says no limit.
_MOST = 1 << 32


@dataclass(frozen=True)
class Evidence:
    """What a policy cost in the records that come with headwise.

    Attributes:
        policy: as words.
        share: of a full cache of 16-bit rows.
        kl: to the full cache, nats per token, mean over passages.
        passages, records: where that was measured.
    """

    policy: str
    share: float
    kl: float
    passages: int
    records: tuple[str, ...]

    @property
    def whole_model(self) -> bool:
        """Whether nothing is let go of before all layers have read the prompt."""
        return self.policy.startswith("auto")


@dataclass(frozen=True)
class Option:
    """A policy for a model, a context and a batch; all in bytes.

    Attributes:
        policy: as words; `FULL` keeps all.
        held: by the cache, once the prompt was read.
        reading: the most there is while it is read, weights included.
        writing: the same while the answer is written.
        kl: as in `Evidence`; None for the full cache.
    """

    policy: str
    held: int
    reading: int
    writing: int
    kl: float | None

    @property
    def peak(self) -> int:
        """The most there is at any time."""
        return max(self.reading, self.writing)


@cache
def evidence() -> tuple[Evidence, ...]:
    """What came with headwise, best first."""
    rows = json.loads(files("headwise.measure").joinpath("evidence.json").read_text(encoding="utf-8"))
    found = (Evidence(**{**row, "records": tuple(row["records"])}) for row in rows)
    return tuple(sorted(found, key=lambda each: each.kl))


def options(sizes: ModelSizes, context: int, batch: int, chunk: int | None = None) -> list[Option]:
    """The full cache, then policies from the best to the smallest.

    Args:
        chunk: tokens that the prompt is read at a time; None for all.
    """
    full = sizes.full_bytes(context, batch)
    work = sizes.reading_bytes(context if chunk is None else min(chunk, context), batch)
    everything = sizes.weight_bytes + full
    found = [Option(FULL, full, everything + work, everything, None)]
    # Rows of a layer that has read all, before it is compressed.
    layer = max((batch * own.bytes(context) for own in sizes.compressed), default=0)
    for each in evidence():
        held = sizes.held_bytes(context, batch, each.share)
        # In chunks all rows are there until the last of them was read.
        beside = full if each.whole_model or chunk is not None else min(full, held + layer)
        choice = batch * min(context, _QUERIES) * sizes.query_bytes + layer if each.whole_model else 0
        reading = sizes.weight_bytes + beside + max(work, choice)
        found.append(Option(each.policy, held, reading, sizes.weight_bytes + held, each.kl))
    return found


def recommended(found: list[Option], memory: int) -> Option | None:
    """The one that costs least of those that fit: all rows, or else what loses least; None where none does."""
    return next((option for option in found if option.peak <= memory), None)


def longest(sizes: ModelSizes, batch: int, memory: int, policy: str, chunk: int | None = None) -> int:
    """Tokens of context that fit under a policy and that the model has room for; 0 where not even one does."""
    low, high = 0, sizes.positions or _MOST
    while low < high:
        middle = (low + high + 1) // 2
        option = next(each for each in options(sizes, middle, batch, chunk) if each.policy == policy)
        low, high = (middle, high) if option.peak <= memory else (low, middle - 1)
    return low
