"""kvpress worker: requests on standard input -> answers on standard output, one JSON object per line each.

Run by an interpreter that has torch, transformers and kvpress, which need not be the one that has headwise; so
nothing of headwise is imported here. Requests:

    {"do": "load", "folder": name or "config": dimensions, "dtype", "device", "threads"}
    {"do": "prefill", "name", "ids", "repeats", "press", "keep"}
    {"do": "decode", "name", "ids"}
    {"do": "drop", "name"}

The end of the input ends the process.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib import import_module, metadata
from typing import Any


class Worker:
    """The model, and of every contender its cache and the positions it has seen."""

    def __init__(self) -> None:
        self.model: Any = None
        self.caches: dict[str, tuple[Any, int]] = {}

    def load(self, ask: dict[str, Any]) -> dict[str, Any]:
        """Load or make the model."""
        import torch
        from transformers import AutoModelForCausalLM, LlamaConfig

        import_module("kvpress")
        torch.set_num_threads(ask["threads"])
        options = {"dtype": getattr(torch, ask["dtype"]), "attn_implementation": "sdpa"}
        if "config" in ask:
            with torch.device(ask["device"]):
                model = AutoModelForCausalLM.from_config(LlamaConfig(**ask["config"]), **options)
        else:
            model = AutoModelForCausalLM.from_pretrained(ask["folder"], **options)
        self.model = model.to(ask["device"]).eval()
        return {name: metadata.version(name) for name in ("kvpress", "transformers", "torch")}

    def prefill(self, ask: dict[str, Any]) -> dict[str, Any]:
        """Read a prompt and press it."""
        import torch
        from transformers import DynamicCache

        press = getattr(import_module("kvpress"), ask["press"])(compression_ratio=1 - ask["keep"])
        ids = torch.tensor(ask["ids"], device=self.model.device)
        cache = DynamicCache()
        with torch.inference_mode(), press(self.model):
            started = self._clock()
            self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            seconds = self._clock() - started
        if ask["repeats"] > 1:
            cache.batch_repeat_interleave(ask["repeats"])
        self.caches[ask["name"]] = (cache, ids.shape[1])
        return {"seconds": seconds, **self._held(ask["name"])}

    def decode(self, ask: dict[str, Any]) -> dict[str, Any]:
        """Feed tokens one by one, each at its own position: the cache is shorter than the text."""
        import torch

        cache, seen = self.caches[ask["name"]]
        columns = torch.tensor(ask["ids"], device=self.model.device).split(1, dim=1)
        positions = torch.arange(seen, seen + len(columns), device=self.model.device).view(-1, 1, 1)
        with torch.inference_mode():
            started = self._clock()
            for column, at in zip(columns, positions, strict=True):
                output = self.model(
                    input_ids=column, past_key_values=cache, position_ids=at, use_cache=True, logits_to_keep=1
                )
                output.logits[:, -1].argmax(dim=-1)
            seconds = self._clock() - started
        self.caches[ask["name"]] = (cache, seen + len(columns))
        return {"seconds": seconds, **self._held(ask["name"])}

    def drop(self, ask: dict[str, Any]) -> dict[str, Any]:
        """Forget a cache."""
        self.caches.pop(ask["name"], None)
        return {}

    def _held(self, name: str) -> dict[str, Any]:
        """By the tensors: a press that only masks has not freed anything.

        Counted as `headwise.measure.stock_caches` counts, which cannot be imported here.
        """
        cache, seen = self.caches[name]
        tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        return {
            "used_bytes": sum(tensor.nbytes for tensor in tensors),
            "allocated_bytes": sum(storages.values()),
            "kept_ratio": sum(tensor.shape[2] for tensor in tensors) / (seen * len(tensors)),
        }

    def _clock(self) -> float:
        if self.model.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()


def answer(worker: Worker, ask: dict[str, Any]) -> dict[str, Any]:
    """What was asked for, or what went wrong."""
    try:
        found: dict[str, Any] = getattr(worker, ask["do"])(ask)
    except Exception as error:  # whatever a press may raise: the bench goes on without it
        text = (str(error).strip().splitlines() or [""])[0]
        return {"error": f"{type(error).__name__}: {text}", "out_of_memory": "OutOfMemory" in type(error).__name__}
    return found


def main() -> None:
    """Answer until the input ends."""
    # Libraries write to standard output what they like; the answers have a channel of their own.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        channel.write(json.dumps(answer(worker, json.loads(line))) + "\n")
        channel.flush()


if __name__ == "__main__":
    main()
