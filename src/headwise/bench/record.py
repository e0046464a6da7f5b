"""Record: what a run has measured so far -> medians, ratios to stock, and plain values for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from headwise.bench.bandwidth import Ceiling, KernelSpeed
from headwise.bench.contenders import STOCK, dtype_name
from headwise.bench.plan import Configuration

# Why a contender did not run whose cache does not fit.
OUT_OF_MEMORY = "out of memory"

# What can be looked at in a prompt: all attention, with bands for FastGen; that of the last rows; what gates predict;
# and what the model looks at while it repeats the prompt.
EXACT, FASTGEN, LAST, GATES, REPETITION = (
    *("mass of all rows", "FastGen's ladder", "the last rows", "gates, rows in bits", "a repetition, rows in bits"),
)


@dataclass(frozen=True)
class Spread:
    """The middle of some measurements, and how far they lie apart."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None where there are none."""
        return cls(median(values), min(values), max(values)) if values else None


@dataclass(frozen=True)
class Held:
    """What a cache holds.

    Attributes:
        used_bytes: of the rows it keeps.
        allocated_bytes: of the storage behind all of its tensors.
        kept_ratio: kept rows over the rows of a full cache.
    """

    used_bytes: int
    allocated_bytes: int
    kept_ratio: float


@dataclass(frozen=True)
class Prefill:
    """One pass over the prompt.

    Attributes:
        tokens: of the prompt that were read.
        profile_seconds, compact_seconds: parts of it that are headwise's; None for others.
        peak_bytes: allocated at its highest, beyond what there was before; None where it is not known.
    """

    seconds: float
    tokens: int
    profile_seconds: float | None = None
    compact_seconds: float | None = None
    peak_bytes: int | None = None


@dataclass
class Measurement:
    """One contender in one configuration; what was not measured (yet) is None.

    Attributes:
        kernel: name of headwise's kernels.
        failure: why it did not run, or not to the end.
        attention_share: part of a step that is the cache's and the attention's.
        coded: whether older rows are codes.
    """

    name: str
    kind: str
    setting: str
    keep: float | None = None
    coded: bool = False
    kernel: str | None = None
    failure: str | None = None
    prefill: Prefill | None = None
    after_prompt: Held | None = None
    after_decode: Held | None = None
    round_seconds: list[float] = field(default_factory=list)
    attention_share: float | None = None
    kernel_speed: KernelSpeed | None = None


@dataclass
class Result:
    """All contenders of one configuration, stock the first of them.

    Attributes:
        own: the model with next to nothing in its cache, whose steps are its own work.
    """

    configuration: Configuration
    steps: int
    measurements: list[Measurement]
    ceiling: Ceiling | None = None
    own: Measurement | None = None

    def find(self, name: str) -> Measurement | None:
        """The contender of that name."""
        return next((measurement for measurement in self.measurements if measurement.name == name), None)

    @property
    def stock(self) -> Measurement | None:
        """What everything is compared with."""
        return self.find(STOCK)

    def tokens_per_second(self, measurement: Measurement) -> list[float]:
        """Of every round."""
        return [self.configuration.batch * self.steps / seconds for seconds in measurement.round_seconds]

    def ratios(self, measurement: Measurement) -> list[float]:
        """How many times as fast as stock, round by round; both had their turn shortly after each other."""
        stock = [] if self.stock is None else self.stock.round_seconds
        return [theirs / ours for theirs, ours in zip(stock, measurement.round_seconds, strict=False)]

    def step_ms(self, measurement: Measurement) -> float | None:
        """Median milliseconds of a step."""
        return median(measurement.round_seconds) / self.steps * 1e3 if measurement.round_seconds else None

    def prefill_ratio(self, measurement: Measurement) -> float | None:
        """Seconds of reading the prompt, once, over those of stock."""
        stock, ours = self.stock, measurement.prefill
        return None if stock is None or stock.prefill is None or ours is None else ours.seconds / stock.prefill.seconds

    def bound_ms(self, measurement: Measurement) -> float | None:
        """What a step takes at least: the model's own work, and what is kept, read as fast as memory gives it."""
        work = None if self.own is None else self.step_ms(self.own)
        if work is None or self.ceiling is None or measurement.after_prompt is None:
            return None
        return work + measurement.after_prompt.used_bytes / self.ceiling.bytes_per_second * 1e3

    def bound_share(self, measurement: Measurement) -> float | None:
        """That over what a step takes."""
        bound, step = self.bound_ms(measurement), self.step_ms(measurement)
        return None if bound is None or step is None else bound / step

    @property
    def stock_spread(self) -> float | None:
        """How far stock's rounds lie apart, as a share of their median; None where there are none."""
        spread = None if self.stock is None else Spread.of(self.stock.round_seconds)
        return None if spread is None else (spread.most - spread.least) / spread.median

    def kernel_share(self, measurement: Measurement) -> float | None:
        """Bytes per second of the decode kernel over the ceiling."""
        if measurement.kernel_speed is None or self.ceiling is None:
            return None
        return measurement.kernel_speed.best / self.ceiling.bytes_per_second

    def excess_layers(self, measurement: Measurement, layers: int) -> float | None:
        """Peak of the prefill beyond what is held in the end and what stock needs besides its cache, in full layers."""
        stock = self.stock
        if stock is None or stock.prefill is None or measurement.prefill is None:
            return None
        ours, theirs = measurement.prefill.peak_bytes, stock.prefill.peak_bytes
        if ours is None or theirs is None or measurement.after_prompt is None or stock.after_prompt is None:
            return None
        # What was read, where the batch repeats it: the peak is of the prefill alone.
        read = self.configuration.distinct / self.configuration.batch
        held, full = (m.after_prompt.allocated_bytes * read for m in (measurement, stock))  # type: ignore[union-attr]  # checked above
        return (ours - held - (theirs - full)) / (full / layers)

    def to_dict(self, layers: int) -> dict[str, Any]:
        """Plain values, every round's seconds among them."""
        configuration = self.configuration
        return {
            "batch": configuration.batch,
            "context": configuration.context,
            "dtype": dtype_name(configuration.dtype),
            "distinct": configuration.distinct,
            "ceiling": None if self.ceiling is None else asdict(self.ceiling),
            "stock_spread": self.stock_spread,
            "model_alone": None
            if self.own is None
            else {"round_seconds": self.own.round_seconds, "step_ms": self.step_ms(self.own)},
            "candidates": [self._describe(measurement, layers) for measurement in self.measurements],
        }

    def _describe(self, measurement: Measurement, layers: int) -> dict[str, Any]:
        speed, ratio = Spread.of(self.tokens_per_second(measurement)), Spread.of(self.ratios(measurement))
        step, share, prefill = self.step_ms(measurement), measurement.attention_share, measurement.prefill
        attention = None if step is None or share is None else step * share
        return {
            **asdict(measurement),
            "tokens_per_second": None if speed is None else asdict(speed),
            "ratio_to_stock": None if ratio is None else asdict(ratio),
            "step_ms": step,
            "attention_ms": attention,
            "rest_ms": None if step is None or attention is None else step - attention,
            "prefill_tokens_per_second": None if prefill is None else prefill.tokens / prefill.seconds,
            "prefill_over_stock": self.prefill_ratio(measurement),
            "bound_ms": self.bound_ms(measurement),
            "bound_share": self.bound_share(measurement),
            "kernel_share_of_ceiling": self.kernel_share(measurement),
            "peak_excess_in_full_layers": self.excess_layers(measurement, layers)
            if measurement.kind == "headwise"
            else None,
        }


@dataclass
class PrefillCosts:
    """Seconds of reading one prompt, one for every turn.

    Attributes:
        looks: by what headwise looks at.
        failures: why one did not run.
    """

    context: int
    dtype: str
    stock: list[float] = field(default_factory=list)
    looks: dict[str, list[float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def excess(self, look: str) -> float | None:
        """How much longer than stock's the median is, as a share of stock's."""
        ours = self.looks.get(look)
        return median(ours) / median(self.stock) - 1 if ours and self.stock else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "excess": {look: self.excess(look) for look in self.looks}}


@dataclass
class Record:
    """Everything a run has found out; whole at any moment, so that a run can be broken off.

    Attributes:
        machine, model, settings, versions: plain values.
        notes: what people should know, such as a contender that is not installed.
        results: one per configuration that was begun.
    """

    machine: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    prefills: PrefillCosts | None = None
    interrupted: bool = False

    @property
    def layers(self) -> int:
        """Of the model."""
        return int(self.model.get("layers", 1))

    def to_dict(self) -> dict[str, Any]:
        """Plain values; the expectations are not in it."""
        return {
            "versions": self.versions,
            "machine": self.machine,
            "model": self.model,
            "settings": self.settings,
            "notes": self.notes,
            "interrupted": self.interrupted,
            "results": [result.to_dict(self.layers) for result in self.results],
            "prefills": None if self.prefills is None else self.prefills.to_dict(),
        }
