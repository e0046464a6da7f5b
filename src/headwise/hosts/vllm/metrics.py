"""Metrics: what the processes of vLLM do for compressed requests -> numbers beside vLLM's own, in Prometheus form.

The process that chooses, and the one that plans blocks, are not the one that is asked for metrics: each writes what it
counted into a file of its own, and the last adds them up. Where several are asked (`--api-server-count`), the files are
those of Prometheus' client, and vLLM adds them up.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

# Names the folder of these files to the processes that vLLM starts.
FOLDER = "HEADWISE_VLLM_METRICS"
# The same of Prometheus' client; set by vLLM where it is needed.
_SHARED = "PROMETHEUS_MULTIPROC_DIR"

_TOLD = {
    "requests": "compressed requests that were let in, by policy",
    "blocks_kept": "blocks that compressed prompts kept",
    "blocks_freed": "blocks of compressed prompts that went back while their requests ran",
    "choosing_seconds": "time spent on choosing rows and moving them, in all workers",
}

_COUNTED: Counter[tuple[str, str]] = Counter()


def count(name: str, more: float, policy: str = "") -> None:
    """Add to a number, and write all of this process down."""
    _COUNTED[name, policy] += more  # type: ignore[assignment]  # seconds are no whole numbers
    if _SHARED in os.environ:
        _shared(name).labels(policy).inc(more)
    folder = os.environ.get(FOLDER)
    if folder is None:
        return
    own = Path(folder) / f"{os.getpid()}.json"
    rows = [[*key, value] for key, value in _COUNTED.items()]
    # An engine must not die of a full disk.
    with contextlib.suppress(OSError):
        own.with_suffix(".new").write_text(json.dumps(rows), encoding="utf-8")
        os.replace(own.with_suffix(".new"), own)


@cache
def _shared(name: str) -> Any:
    from prometheus_client import Counter as SharedCounter

    # What it counts goes into a file, whether or not this process is asked for it.
    return SharedCounter(f"headwise:{name}", _TOLD[name], ["policy"], registry=None)


def totals() -> Counter[tuple[str, str]]:
    """Sums over all processes, by name and policy."""
    found: Counter[tuple[str, str]] = Counter()
    for file in sorted(Path(os.environ[FOLDER]).glob("*.json")) if FOLDER in os.environ else ():
        with contextlib.suppress(OSError, ValueError):
            for name, policy, value in json.loads(file.read_text(encoding="utf-8")):
                found[name, policy] += value
    return found


class Collector:
    """What Prometheus' client asks."""

    def collect(self) -> Iterator[Any]:
        """All numbers; `headwise:kept_ratio` is of the blocks of all compressed prompts so far."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        found = totals()
        for name, words in _TOLD.items():
            family = CounterMetricFamily(f"headwise:{name}", words, labels=["policy"])
            for (other, policy), value in found.items():
                if other == name:
                    family.add_metric([policy], value)
            yield family
        kept, freed = (sum(v for (n, _), v in found.items() if n == f"blocks_{end}") for end in ("kept", "freed"))
        ratio = GaugeMetricFamily("headwise:kept_ratio", "blocks kept of those that compressed prompts filled")
        ratio.add_metric([], kept / (kept + freed) if kept + freed else 1.0)
        yield ratio


def tell() -> None:
    """Once in every process: where to count, and that there are numbers."""
    if FOLDER not in os.environ:
        os.environ[FOLDER] = made = tempfile.mkdtemp(prefix="headwise-")
        atexit.register(shutil.rmtree, made, ignore_errors=True)
    from prometheus_client import REGISTRY

    if not any(isinstance(each, Collector) for each in REGISTRY._collector_to_names):
        REGISTRY.register(Collector())
