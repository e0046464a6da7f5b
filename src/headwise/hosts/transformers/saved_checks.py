"""Saved checks: what a file says a cache holds -> nothing, or an error that says what no cache can hold.

A file may be damaged, or made by somebody else: nothing in it is taken for granted. What a layer holds then reaches
kernels, of which those for a GPU do not look whether a row's column or a head's length can be.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from headwise.contract import LayerFacts, LayerShape
from headwise.errors import InputError
from headwise.hosts.transformers.layer import HeadwiseLayer
from headwise.hosts.transformers.parts import CacheParts
from headwise.stages.layer import LayerCache
from headwise.store.row_parts import row_parts
from headwise.types import Int, Tensor

_COUNT, _FLOATS = torch.int64, (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Of everything in a file; the same for the same content."""
    found = zlib.crc32(json.dumps(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        found = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), found)
        flat = tensor.detach().cpu().contiguous().flatten()
        if flat.numel():
            found = zlib.crc32(flat.view(torch.uint8).numpy().data, found)
    return f"{found:08x}"


class _Part:
    """Tensors of one part of a cache, taken out one by one."""

    def __init__(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        self._name = name
        self.left = dict(tensors)

    def check(self, holds: bool, what: str) -> None:
        """Refuse the file where it does not hold.

        Raises:
            InputError: saying where.
        """
        if not holds:
            raise InputError(f"not a sound saved cache: {what} of {self._name}")

    def take(self, name: str, shape: Sequence[int | None], *dtypes: torch.dtype) -> Tensor:
        """A tensor that must be there, of that shape, None for any length, and of one of those types; no NaN."""
        self.check(name in self.left, f"there are no {name}")
        tensor = self.left.pop(name)
        fits = tensor.ndim == len(shape) and all(
            wanted in (None, given) for wanted, given in zip(shape, tensor.shape, strict=True)
        )
        self.check(fits, f"shape {tuple(tensor.shape)} of {name}, where {tuple(shape)} is wanted,")
        self.check(tensor.dtype in dtypes, f"type {tensor.dtype} of {name}")
        if tensor.is_floating_point():
            self.check(not bool(tensor.isnan().any()), f"NaN among the {name}")
        return tensor

    def within(self, name: str, tensor: Tensor, least: int, most: int | float) -> None:
        """Refuse numbers that are too small or too large."""
        if tensor.numel():
            self.check(least <= int(tensor.min()) and int(tensor.max()) <= most, f"{name} out of range")

    def end(self) -> None:
        """Refuse what nobody asked for."""
        self.check(not self.left, f"there is something unknown, {next(iter(self.left), '')!r},")


def check_saved(
    parts: CacheParts,
    facts: Sequence[LayerFacts],
    tensors: Mapping[str, Tensor],
    plain: Any,
) -> None:
    """Refuse what a cache of these parts cannot hold.

    Args:
        facts: of the model's layers.
        tensors, plain: as `collect` gives them.

    Raises:
        InputError: saying what, of which part.
    """
    owned: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        owner, _, field = name.rpartition(".")
        owned.setdefault(owner, {})[field] = tensor
    top = _Part("the whole", {})
    top.check(isinstance(plain, dict), "no state")
    columns, passes = plain.get("columns"), plain.get("passes")
    for name, count in (("columns", columns), ("passes", passes)):
        top.check(isinstance(count, int) and 0 <= count < 2**31, f"{name} {str(count)[:20]}")
    batches: set[int] = set()
    for index, layer in enumerate(parts.layers):
        state, flags = owned.pop(f"layers.{index}", {}), plain.get(str(index), {})
        part = _Part(f"layer {index}", state)
        part.check(isinstance(flags, dict), "flags")
        if isinstance(layer, HeadwiseLayer):
            part.check(bool(state) == (columns > 0), "state")
            part.check(type(layer) is not HeadwiseLayer or not flags, "flags")
            if state:
                batches.add(_check_compressed(part, layer.core, facts[index].shape, columns))
        if type(layer) is not HeadwiseLayer:
            # Where nothing is compressed, nobody counts columns but the layers.
            batches |= _check_stock(part, layer, facts[index].shape, flags, columns if parts.compressed else None)
        part.end()
    top.check(len(batches) <= 1, f"numbers of sequences {sorted(batches)}")
    batch = next(iter(batches), 0)
    _check_tokens(parts, _Part("the token log", owned.pop("transcript", {})), batch, columns)
    kinds = _Part("the ids", owned.pop("kinds", {}))
    if kinds.left:
        kinds.check(parts.kinds is not None, "nobody asks for ids")
        kinds.take("ids", (batch, columns), _COUNT)
    kinds.end()
    top.check(not owned, f"there is something unknown, {next(iter(owned), '')!r},")


def _check_compressed(part: _Part, core: LayerCache, shape: LayerShape | None, columns: int) -> int:
    """One layer of headwise's; returns how many sequences it holds."""
    config = core.config
    rungs, precision = len(config.policy.rungs), config.cache.precision
    heads = None if shape is None else shape.heads
    choice = part.take("choice", (None, heads), _COUNT)
    part.within("choice", choice, 0, rungs - 1)
    batch, heads = choice.shape
    part.within("prompt", part.take("prompt", (batch,), _COUNT), 0, columns)
    counters = part.take("counters", (3,), _COUNT)
    seen, evicted_at, rows_read = counters.tolist()
    part.check(seen == columns and 0 <= evicted_at <= seen and 0 <= rows_read <= 2**31, "counters")
    for name, wanted in (("recovered", (rungs, batch, heads)), ("threshold", (batch,)), ("matched", (2, batch, heads))):
        if name in part.left:
            part.take(name, wanted, torch.float32)
    again = config.again
    part.check(("newest_queries" in part.left) == (again is not None), "newest queries")
    if again is not None:
        dim = None if shape is None else shape.key_dim
        part.take("newest_queries", (batch, heads, None, again.queries, dim), *_FLOATS)
        part.within("newest_columns", part.take("newest_columns", (again.queries,), _COUNT), -1, columns - 1)
        if "newest_before" in part.left:
            part.within("newest_before", part.take("newest_before", (), _COUNT), 0, again.stride - 1)
    scored = any("score" in config.policy.rungs[index].reads for index in choice.unique().tolist())
    parts_of = partial(row_parts, scored=scored or "scores" in part.left, biased="biases" in part.left)
    keys, values = part.left.get("keys"), part.left.get("values")
    part.check(keys is not None and values is not None and keys.ndim == values.ndim == 2, "rows")
    assert keys is not None and values is not None
    part.check(keys.dtype in _FLOATS and keys.dtype == values.dtype, f"type {keys.dtype} of keys")
    dims = (keys.shape[1], values.shape[1]) if shape is None else (shape.key_dim, shape.value_dim)
    held = [_check_rows(part, "", parts_of(*dims, keys.dtype), (batch, heads), columns)]
    if precision is not None:
        part.within("formats", part.take("formats", (batch, heads), _COUNT), -1, len(precision.formats) - 1)
        for name in ("unpacked", *({"decided"} & part.left.keys())):
            part.within(name, part.take(name, (), _COUNT), 0, columns)
        for index, format in enumerate(precision.formats):
            if f"packed{index}_lengths" not in part.left:
                # Not a row in that format; what else there is of it is unknown, and found to be in the end.
                continue
            coded = parts_of(*dims, keys.dtype, format)
            held.append(_check_rows(part, f"packed{index}_", coded, (batch, heads), columns))
    everything = torch.cat(held)
    part.check(len(everything.unique()) == len(everything), "a column that a head has twice")
    if core.evicted.features is not None and "less_sums" in part.left:
        count = core.evicted.features.count
        part.take("less_sums", (batch, heads, count, dims[1]), torch.float32)
        part.within("less_mass", part.take("less_mass", (batch, heads, count), torch.float32), 0, math.inf)
    return batch


def _check_rows(
    part: _Part, prefix: str, consists_of: Sequence[Any], heads: tuple[int, int], columns: int
) -> Int[Tensor, " rows"]:
    """Rows of all heads; returns a number for each that says of which head and column it is."""
    lengths = part.take(f"{prefix}lengths", heads, _COUNT)
    part.within(f"{prefix}lengths", lengths, 0, columns)
    rows = int(lengths.sum())
    taken = {each.name: part.take(prefix + each.name, (rows, *each.shape), each.dtype) for each in consists_of}
    part.within(f"{prefix}columns", taken["columns"], 0, columns - 1)
    if "biases" in taken:
        part.check(bool(taken["biases"].isfinite().all()), "biases")
    owner = torch.arange(lengths.numel(), device=lengths.device).repeat_interleave(lengths.flatten())
    return owner * columns + taken["columns"]


def _check_stock(
    part: _Part, layer: CacheLayerMixin, shape: LayerShape | None, flags: dict[str, Any], columns: int | None
) -> set[int]:
    """One layer of transformers' own, or the states beside a compressed one; returns how many sequences it holds."""
    known, batches = vars(layer), set()
    for name, flag in flags.items():
        owner = name.partition("[")[0]
        part.check(owner in known and isinstance(flag, bool | int), f"there is something unknown, {name!r},")
        # What a layer is does not change; what it has seen does.
        changes = isinstance(flag, bool) or owner != name or "cumulative" in name
        part.check(changes or known[name] == flag, f"{name} {str(flag)[:20]}")
        part.check("cumulative" not in name or columns in (None, flag), f"{name} {str(flag)[:20]}")
    for name in list(part.left):
        own = name.removeprefix("linear:").partition("[")[0]
        tensor = part.take(name, part.left[name].shape, part.left[name].dtype)
        part.check(own in known, f"there is something unknown, {name!r},")
        if tensor.ndim == 0:
            part.check(torch.equal(torch.as_tensor(known[own]).cpu(), tensor.cpu()), name)
            continue
        batches.add(len(tensor))
        if own in ("keys", "values"):
            dim = None if shape is None else shape.key_dim if own == "keys" else shape.value_dim
            fits = tensor.ndim == 4 and (shape is None or tensor.shape[1] == shape.heads)
            fits = fits and (columns is None or tensor.shape[2] <= columns)
            part.check(fits and dim in (None, tensor.shape[-1]), f"shape of {name}")
            part.check(tensor.dtype in _FLOATS, f"type {tensor.dtype} of {name}")
    return batches


def _check_tokens(parts: CacheParts, log: _Part, batch: int, columns: int) -> None:
    """What is known of tokens."""
    log.check(("kinds" in log.left) == (parts.log.needs_kinds and columns > 0), "kinds")
    if "kinds" in log.left:
        log.take("kinds", (batch, columns), torch.uint8)
    if "shift" in log.left:
        log.take("shift", (batch,), torch.int64)
    if "marks" in log.left:
        marks = log.take("marks", (batch, None), torch.float32)
        pinned = log.take("pinned", (batch, None), torch.bool)
        fits = marks.shape == pinned.shape and marks.shape[1] <= columns and bool(marks.isfinite().all())
        log.check(fits and parts.log.marks.steers, "marks")
    if "real" in log.left:
        real = log.take("real", (batch, columns), torch.bool)
        positions = log.take("positions", (batch, columns), torch.int32)
        log.check(torch.equal(positions, (real.cumsum(dim=1) - 1).clamp(min=0).to(torch.int32)), "positions")
    log.end()
