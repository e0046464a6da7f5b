"""Speed: the shape of Llama-3-8B with random weights -> the decode kernel, steps and prefills, and the targets.

All of it is `headwise bench`, one configuration a case: what the targets are about first, then the rest of the grid.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from headwise.bench.bandwidth import last_level_cache, measure_ceiling, measure_stores
from headwise.bench.contenders import Contender, dtype_name, full, keeping, stock, with_bits, with_graph
from headwise.bench.expectations import NOT_RUN, Expectation, gpu
from headwise.bench.models import random_model
from headwise.bench.plan import CODED_BITS, GPU_SIZES, PREFILL_CONTEXT, Configuration, Plan
from headwise.bench.prefill import measure_prefills
from headwise.bench.record import OUT_OF_MEMORY, PrefillCosts, Record
from headwise.bench.run import BenchModel, run
from headwise.kernels.triton.backend import KERNELS
from headwise.measure.model_info import SHAPES, Shape
from headwise.quant.formats import Precision, RowFormat
from headwise.store.rows import Rows
from headwise.store.store import RowStore
from headwise.types import Tensor
from on_gpu.cases import Case, Figures, Setting, Wrong

_POLICY = "h2o"
_FORMATS = {"16 bit": None, "int8": RowFormat(8, 8), "int4": RowFormat(4, 4)}

# Batch and context of the grid, in the order in which they matter, beside those of the targets.
_GRID = (1, 8192), (8, 2048), (32, 8192), (1, 32768), (8, 16384), (8, 32768), (32, 2048), (1, 16384), (32, 32768)
_TINY_SIZES, _TINY_GRID, _TINY_PREFILL = ((1, 40), (2, 48), (3, 56)), ((2, 40),), 64


def cases(setting: Setting) -> list[Case]:
    """The kernel alone, what the targets are about, and the grid as far as there is time."""
    one, some, many = sizes(setting)
    found = [Case(f"kernel alone, {name}", partial(kernel_alone, setting, name)) for name in _FORMATS]
    found += [
        _decode(setting, some, _of_target),
        _decode(setting, many, _of_many),
        Case("prefill", partial(_prefill, setting)),
        _decode(setting, one, _of_target),
    ]
    grid = _TINY_GRID if setting.tiny else _GRID
    return [*found, *(_decode(setting, size, _of_grid) for size in grid)]


def sizes(setting: Setting) -> tuple[tuple[int, int], ...]:
    """Batches and contexts that the targets are about."""
    return _TINY_SIZES if setting.tiny else GPU_SIZES


def expected(setting: Setting) -> tuple[Expectation, ...]:
    """The targets; on a CPU of sizes that tell nothing, so that they can be judged there."""
    return gpu(_dtype(setting), sizes(setting))


def judged(setting: Setting, record: Record) -> list[dict[str, Any]]:
    """Those targets that the record says anything on."""
    verdicts = [expectation.judge(record) for expectation in expected(setting)]
    return [verdict.to_dict() for verdict in verdicts if verdict.verdict != NOT_RUN]


# The kernel alone.


def kernel_alone(setting: Setting, name: str) -> Figures:
    """Bytes per second of the decode kernel over layers of full pages, against a copy."""
    device, group = setting.device, 4
    shape = (1, 1, 40, 16) if setting.tiny else (8, 8, 4096, 128)
    format = _FORMATS[name]
    torch.manual_seed(0)
    # So many layers that none is in the cache when its turn comes again.
    stores = [_store(shape, format, _dtype(setting), device) for _ in range(1 if setting.tiny else 8)]
    with torch.inference_mode():
        speed = measure_stores(stores, KERNELS, group, last_level_cache(device))
    ceiling = measure_ceiling(device, 2**20 if setting.tiny else None)
    assert speed is not None
    share = speed.best / ceiling.bytes_per_second
    return {"bytes": speed.bytes, "best": speed.best, "median": speed.median, "copy": ceiling.bytes_per_second} | {
        "share_of_copy": share
    }


def _store(
    shape: tuple[int, int, int, int], format: RowFormat | None, dtype: torch.dtype, device: torch.device
) -> RowStore:
    batch, heads, rows, _ = shape
    keys, values = (torch.randn(shape, dtype=torch.float32, device=device).to(dtype) for _ in range(2))
    columns = torch.arange(rows, dtype=torch.long, device=device).expand(batch, heads, -1)
    there = torch.ones(batch, heads, rows, dtype=torch.bool, device=device)
    new = Rows.of(keys, values, columns, None, there)
    precision = None if format is None else Precision((format,))
    store = RowStore(new, page_size=16, scored=False, precision=precision)
    store.fill(new)
    return store


# The whole step, and the prefill.


def _of_target(context: int) -> list[Contender]:
    """Everything kept, and half of it, plain, captured and in few bits."""
    half = keeping(_POLICY, 0.5, context)
    coded = [with_bits(half, bits) for bits in CODED_BITS]
    plain = [half, *coded, keeping(_POLICY, 0.25, context), full()]
    return [stock(), half, *(with_graph(one) for one in plain), *coded]


def _of_many(context: int) -> list[Contender]:
    quarter = keeping(_POLICY, 0.25, context)
    return [stock(), with_graph(quarter), quarter]


def _of_grid(context: int) -> list[Contender]:
    plain = [full(), keeping(_POLICY, 0.5, context), keeping(_POLICY, 0.25, context)]
    coded = [with_bits(full(), bits) for bits in CODED_BITS]
    return [stock(), *(with_graph(one) for one in [*plain, *coded])]


def _decode(setting: Setting, size: tuple[int, int], contenders: Callable[[int], Sequence[Contender]]) -> Case:
    batch, context = size
    return Case(f"decode, batch {batch}, context {context:,}", partial(_run, setting, batch, context, contenders))


def _run(setting: Setting, batch: int, context: int, contenders: Callable[[int], Sequence[Contender]]) -> Figures:
    """One configuration, as far as it gets; one sequence is read, and stands for all of the batch."""
    made = Configuration(batch, context, _dtype(setting), tuple(contenders(context)), distinct=1)
    record = Record()

    def found() -> Figures:
        return {
            "result": [result.to_dict(record.layers) for result in record.results],
            "targets": judged(setting, record),
        }

    plan = _plan(setting, (made,))
    run(plan, "random weights", lambda _: _model(setting), None, record, lambda _: setting.tell(found()))
    failures = [
        f"{measurement.name}: {measurement.failure}"
        for measurement in record.results[0].measurements
        if measurement.failure not in (None, OUT_OF_MEMORY)
    ]
    if failures:
        raise Wrong("; ".join(failures), **found())
    return found()


def _prefill(setting: Setting) -> Figures:
    """Stock, and each kind of look at the prompt, in turn."""
    made, context = _model(setting), _TINY_PREFILL if setting.tiny else PREFILL_CONTEXT["cuda"]
    record = Record(prefills=PrefillCosts(context, dtype_name(_dtype(setting))))
    assert record.prefills is not None
    costs = record.prefills

    def found() -> Figures:
        return {"prefills": costs.to_dict(), "targets": judged(setting, record)}

    ids, plan = made.ids(1, context), _plan(setting, ())
    measure_prefills(costs, made.model, None, ids, plan, lambda _: setting.tell(found()))
    if costs.failures:
        raise Wrong("; ".join(f"{look}: {why}" for look, why in costs.failures.items()), **found())
    return found()


def _plan(setting: Setting, configurations: tuple[Configuration, ...]) -> Plan:
    steps, rounds = (2, 1) if setting.tiny else (16, 3)
    capture: Callable[[Callable[[], Tensor]], Callable[[], Tensor]] | None = None
    if setting.device.type == "cpu":
        # Nothing can be captured there: the step runs again.
        def capture(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
            return step

    # Whole steps in Triton's interpreter would take minutes.
    kernel = "reference" if setting.tiny else "triton"
    return Plan(configurations, steps, rounds, kernel, steps, capture=capture, keep_going=True)


@functools.cache
def _model(setting: Setting) -> BenchModel:
    shape: Shape = SHAPES["tiny" if setting.tiny else "llama-3-8b"]
    torch.manual_seed(0)
    return BenchModel(random_model(shape, _dtype(setting), setting.device), None, shape)


def _dtype(setting: Setting) -> torch.dtype:
    return torch.float32 if setting.device.type == "cpu" else torch.bfloat16
