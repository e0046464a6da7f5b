"""Memory: a model and policies -> what the allocator says that a cache takes, against what the cache reports."""

from __future__ import annotations

import functools
import gc
from functools import partial
from typing import Any

import torch

import headwise
from headwise.hosts.transformers.graph import DecodeGraph
from headwise.measure.model_info import Shape
from headwise.measure.peak_memory import peak_memory
from headwise.measure.stock_caches import dynamic_cache, held_by
from headwise.policies.words import in_bits
from on_gpu.cases import Case, Figures, Setting, Wrong
from on_gpu.models import prompt, sharp_model

# Eight layers of Llama-3-8B: caches of hundreds of MiB, beside which what else is allocated does not count.
_SHAPE = Shape(8, 4096, 32, 8, 14336, 32000, 131072)

# What a cache may hold beside what it reports: blocks of the allocator are rounded up, tokens are logged.
_SHARE, _PER_LAYER = 0.01, 2**17
# Layers of a full cache that a prefill may need beyond what is held and what stock needs.
_EXCESS = 1.5

POLICIES: dict[str, headwise.Policy] = {
    "full": headwise.Full(),
    "half": headwise.H2O(heavy=0.25, recent=0.25),
    "quarter, int8": in_bits(headwise.H2O(heavy=0.125, recent=0.125), "int8"),
    "full, int4": in_bits(headwise.Full(), "int4"),
    "quarter by the last rows": headwise.SnapKV(keep=0.25),
}


def cases(setting: Setting) -> list[Case]:
    """What is held and what was needed for it; and that all of it is given back."""
    found = [Case(f"held, {name}", partial(_held, setting, policy)) for name, policy in POLICIES.items()]
    return [*found, Case("captured step, half", partial(_captured, setting, POLICIES["half"]))]


@functools.cache
def _model(setting: Setting) -> Any:
    model = sharp_model(_SHAPE, torch.float32 if setting.tiny else torch.bfloat16, setting)
    # Libraries take their working memory with the first products.
    _read(model, dynamic_cache(model), _ids(model, setting))
    return model


def _ids(model: Any, setting: Setting) -> torch.Tensor:
    return prompt(model, 2, 200) if setting.tiny else prompt(model, 4, 4096)


def _read(model: Any, cache: Any, ids: torch.Tensor) -> None:
    with torch.inference_mode():
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)


@functools.cache
def _of_stock(setting: Setting) -> tuple[int, int]:
    """Bytes that transformers' own cache holds, and the prefill's peak."""
    model = _model(setting)
    cache = dynamic_cache(model)
    with peak_memory(setting.device) as peak:
        _read(model, cache, _ids(model, setting))
    return held_by(cache).allocated_bytes, peak.bytes or 0


def _held(setting: Setting, policy: headwise.Policy) -> Figures:
    model, ids = _model(setting), _ids(_model(setting), setting)
    layers, (stock, stock_peak) = model.config.num_hidden_layers, _of_stock(setting)
    # What is made once for all caches.
    _read(model, headwise.HeadwiseCache(model, policy), ids)
    gc.collect()
    before = _allocated(setting)
    cache = headwise.HeadwiseCache(model, policy)
    with peak_memory(setting.device) as peak:
        _read(model, cache, ids)
    gc.collect()
    report = cache.report()
    figures = {
        "reported_bytes": report.allocated_bytes,
        "used_bytes": report.used_bytes,
        "full_bytes": report.full_bytes,
        "stock_bytes": stock,
        "allocator_bytes": peak.left,
        "peak_bytes": peak.bytes,
        "excess_layers": ((peak.bytes or 0) - report.allocated_bytes - (stock_peak - stock)) / (stock / layers),
    }
    del cache, report
    gc.collect()
    left = None if before is None else _allocated(setting) - before
    figures["left_bytes"] = left
    room = _SHARE * figures["reported_bytes"] + layers * _PER_LAYER
    if not abs(figures["allocator_bytes"] - figures["reported_bytes"]) <= room:
        raise Wrong("the allocator's figure is not what the report says", **figures)
    if left:
        raise Wrong("not everything is given back", **figures)
    if not setting.tiny and figures["excess_layers"] > _EXCESS:
        raise Wrong(f"the prefill needs more than {_EXCESS} layers beside what it holds", **figures)
    return figures


def _captured(setting: Setting, policy: headwise.Policy) -> Figures:
    """Capturing a step takes memory, which is given back with the cache."""
    model, ids = _model(setting), _ids(_model(setting), setting)
    capture = {} if setting.device.type == "cuda" else {"capture": lambda step: step}
    found = []
    for _ in range(2):
        gc.collect()
        before = _allocated(setting)
        cache = headwise.HeadwiseCache(model, policy)
        _read(model, cache, ids)
        held = cache.report().allocated_bytes
        with torch.inference_mode(), DecodeGraph(model, cache, **capture) as graph:
            for column in ids[:, :20].split(1, dim=1):
                graph.step(column)
            taken = None if before is None else _allocated(setting) - before
        del cache, graph
        gc.collect()
        left = None if before is None else _allocated(setting) - before
        found.append({"reported_bytes": held, "with_graph_bytes": taken, "left_bytes": left})
    # The first time libraries take memory for good.
    if found[1]["left_bytes"]:
        raise Wrong("not everything is given back", **found[1])
    return found[1]


def _allocated(setting: Setting) -> int | None:
    """Bytes of tensors on the device; None on a CPU, which does not tell."""
    if setting.device.type != "cuda":
        return None
    torch.cuda.synchronize(setting.device)
    return torch.cuda.memory_allocated(setting.device)
