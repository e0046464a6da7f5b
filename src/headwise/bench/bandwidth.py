"""Bandwidth: a filled cache -> bytes per second of the decode kernel alone, and the most that the memory gives."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch

from headwise.kernels.interface import Decoded, DecodeRequest, Kernels, PageView
from headwise.store.store import RowStore
from headwise.types import LogitOptions, Tensor
from headwise.units import clock

if TYPE_CHECKING:
    from headwise.hosts.transformers.cache import HeadwiseCache

# Far beyond any last-level cache; a GPU copies the smaller of them in a quarter of a millisecond.
_BUFFER_BYTES, _GPU_BUFFER_BYTES = 512 * 2**20, 2**31
_REPEATS = 5
_KERNEL_REPEATS = 15


@dataclass(frozen=True)
class Ceiling:
    """The most that memory gives: reading on a CPU; reading and writing, as a copy does, on a GPU.

    Attributes:
        method: which way of reading was the fastest.
    """

    bytes_per_second: float
    method: str


@dataclass(frozen=True)
class KernelSpeed:
    """The decode kernel alone, over all layers in turn.

    Attributes:
        bytes: kept keys and values that one turn reads.
        best, median: bytes per second.
        beyond_cache: whether they are more than the last-level cache holds; None where its size is not known.
    """

    bytes: int
    best: float
    median: float
    beyond_cache: bool | None


def measure_ceiling(device: torch.device, size: int | None = None) -> Ceiling:
    """Read a buffer with everything that is quick at it, and take the best."""
    size = size or (_GPU_BUFFER_BYTES if device.type == "cuda" else _BUFFER_BYTES)
    # Written to: memory that was never touched is one page of zeros, which the cache holds.
    buffer = torch.ones(size // 4, dtype=torch.float32, device=device)
    if device.type == "cuda":
        target = torch.empty_like(buffer.uniform_())
        methods: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(buffer)}
        moved = 2 * buffer.nbytes
    else:
        matrix, vector = buffer.view(-1, 1024), torch.ones(1024, dtype=torch.float32, device=device)
        methods = {
            "sum": buffer.sum,
            "amax": buffer.amax,
            "matrix times vector": lambda: matrix @ vector,
            **_own_reader(buffer),
        }
        moved = buffer.nbytes
    best = {name: min(_timed(method, device) for _ in range(_REPEATS)) for name, method in methods.items()}
    method = min(best, key=lambda name: best[name])
    return Ceiling(moved / best[method], method)


def measure_kernel(cache: HeadwiseCache, group: int, size_of_cache: int | None) -> KernelSpeed | None:
    """Let the decode kernel attend with one made-up query per sequence, again and again; None where nothing is kept.

    Args:
        cache: that has seen its prompt; it is not changed.
        group: query heads per KV head.
        size_of_cache: bytes of the last-level cache, where known.
    """
    layers = [layer.core for layer in cache.headwise_layers if layer.core.store is not None]
    stores = [core.store for core in layers if core.store is not None]
    return measure_stores(stores, layers[0].config.cache.kernels, group, size_of_cache) if stores else None


def measure_stores(
    stores: Sequence[RowStore], kernels: Kernels, group: int, size_of_cache: int | None
) -> KernelSpeed | None:
    """The same for stores that lie on one device, all of them in turn.

    On a GPU the launches are captured and replayed: one by one they would take longer than the kernels themselves.
    """
    calls = [_decode_call(store, kernels.ragged_decode, group) for store in stores]
    moved, device = sum(_read_bytes(view) for store in stores for view in store.view()), stores[0].device
    if not moved:
        return None

    def all_stores() -> Tensor:
        return [call().output for call in calls][-1]

    all_stores()
    turn: Callable[[], object] = all_stores
    if device.type == "cuda":
        from headwise.hosts.transformers.graph import cuda_graph

        turn = cuda_graph(all_stores)
    seconds = [_timed(turn, device) for _ in range(_KERNEL_REPEATS)]
    beyond = None if size_of_cache is None else moved > size_of_cache
    return KernelSpeed(moved, moved / min(seconds), moved / median(seconds), beyond)


def last_level_cache(device: torch.device) -> int | None:
    """Bytes of the largest cache between the processor and its memory; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [0]
    if "SC_LEVEL3_CACHE_SIZE" in os.sysconf_names:
        sizes.append(os.sysconf("SC_LEVEL3_CACHE_SIZE"))
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        sizes.append(_bytes_of(file.read_text(encoding="ascii").strip()))
    return max(sizes) or None


def _read_bytes(view: PageView) -> int:
    """What a decode kernel reads of the rows: keys, values and steps."""
    pools = [view.keys, view.values]
    if view.coding is not None:
        pools += [view.coding.key_steps, view.coding.value_steps]
    return int(view.lengths.sum()) * sum(pool.shape[-1] * pool.element_size() for pool in pools)


def _decode_call(store: RowStore, kernel: Callable[[DecodeRequest], Decoded], group: int) -> Callable[[], Decoded]:
    pages = store.view()
    batch, heads = store.lengths.shape
    exact = pages[0]
    key_dim, value_dim = exact.keys.shape[-1], exact.values.shape[-1]

    def row(*shape: int) -> Tensor:
        return torch.randn(batch, heads, *shape, dtype=torch.float32, device=store.device).to(exact.keys.dtype)

    query, key, value = row(group, 1, key_dim), row(1, key_dim), row(1, value_dim)
    options = LogitOptions(scaling=key_dim**-0.5)
    request = DecodeRequest(query, pages, key, value, None, options)
    return lambda: kernel(request)


def _own_reader(buffer: Tensor) -> dict[str, Callable[[], object]]:
    """The compiled library's own loop, where the package has one."""
    try:
        from headwise.kernels.cpu import backend as cpu
    except ImportError:
        return {}
    read = getattr(cpu, "read", None)
    if read is None or cpu.obstacle(buffer.device) is not None:
        return {}
    return {"headwise.kernels.cpu.read": lambda: read(buffer)}


def _timed(action: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        # By the device's own clock: the host would count what it takes to launch and to wait.
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        action()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3
    started = clock(device)
    action()
    return clock(device) - started


def _bytes_of(text: str) -> int:
    """A size as Linux writes it, such as 32768K."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    return int(text.rstrip("KMG")) * units.get(text[-1:], 1)
