"""Contender run: a contender and a model -> what reads a prompt, decodes when it is its turn, and tells its costs."""

from __future__ import annotations

import gc
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from headwise.bench.bandwidth import KernelSpeed, last_level_cache, measure_kernel
from headwise.bench.contenders import HEADWISE, QUANTIZED, Contender
from headwise.bench.models import Model, Tokenizer, share_weights, watched_attention
from headwise.bench.plan import Plan
from headwise.bench.record import Held, Prefill
from headwise.measure.model_info import query_heads_per_kv_head
from headwise.measure.peak_memory import peak_memory
from headwise.measure.stock_caches import dynamic_cache, held_by, quantized_cache
from headwise.types import Int, Tensor
from headwise.units import clock


class ContenderRun(ABC):
    """One contender at work."""

    def __init__(self, contender: Contender) -> None:
        self.contender = contender

    @property
    def kernel(self) -> str | None:
        """Name of headwise's kernels, once the prompt has been read; None for others."""
        return None

    @abstractmethod
    def prefill(self, ids: Int[Tensor, "b t"], repeats: int = 1) -> Prefill:
        """Read the prompt into an empty cache; then repeat every sequence in it, which is not part of the time."""

    @abstractmethod
    def decode(self, ids: Int[Tensor, "b t"]) -> float:
        """Feed the tokens one by one; returns the seconds it took."""

    @abstractmethod
    def held(self) -> Held:
        """What the cache holds now."""

    def attention_share(self, ids: Int[Tensor, "b t"]) -> float | None:
        """Feed the tokens one by one, and return which part of the time went to cache and attention."""
        return None

    def kernel_speed(self) -> KernelSpeed | None:
        """The decode kernel alone, where there is one of headwise's."""
        return None

    def close(self) -> None:
        """Let go of everything; `free_memory` then gives it back."""
        return


class LocalRun(ContenderRun):
    """A contender in this process, on a model of its own that shares its weights with the others.

    While it is there, a headwise cache changes the attention of its model: this way of nobody else's.
    """

    def __init__(self, contender: Contender, model: Model, tokenizer: Tokenizer | None, plan: Plan) -> None:
        super().__init__(contender)
        self._model: Any = share_weights(model)
        self._device = model.device
        self._tokenizer = tokenizer
        self._plan = plan
        self._cache: Any = None
        self._graph: Any = None
        self._group = query_heads_per_kv_head(model.config.get_text_config(decoder=True))
        # Nobody reads the logits of a prompt but the last.
        takes = inspect.signature(model.forward).parameters
        self._last_logits_only = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}

    @property
    def kernel(self) -> str | None:
        """Name of headwise's kernels."""
        return self._cache.kernel if self.contender.kind == HEADWISE and self._cache is not None else None

    def prefill(self, ids: Int[Tensor, "b t"], repeats: int = 1) -> Prefill:
        """Read the prompt into a new cache."""
        ids = ids.to(self._device)
        # The old one goes first, or there would be two.
        self.drop()
        self._cache = self._new_cache()
        with torch.inference_mode():
            with peak_memory(self._device) as peak:
                started = clock(self._device)
                self._forward(ids)
                seconds = clock(self._device) - started
            if repeats > 1:
                self._cache.batch_repeat_interleave(repeats)
        profile = compact = None
        if self.contender.kind == HEADWISE:
            report = self._cache.report()
            profile, compact = float(report.profile_seconds), float(report.compact_seconds)
        return Prefill(seconds, ids.numel(), profile, compact, peak.bytes)

    def decode(self, ids: Int[Tensor, "b t"]) -> float:
        """Forward passes of one token, and the likeliest next token, which is not used."""
        columns = ids.to(self._device).split(1, dim=1)
        with torch.inference_mode():
            if self.contender.graph and self._graph is None:
                from headwise.hosts.transformers.graph import DecodeGraph

                room, capture = self._plan.new_tokens, self._plan.capture
                self._graph = DecodeGraph(self._model, self._cache, room=room, capture=capture)
            started = clock(self._device)
            for column in columns:
                logits = self._forward(column).logits[:, -1] if self._graph is None else self._graph.step(column)
                logits.argmax(dim=-1)
            return clock(self._device) - started

    def attention_share(self, ids: Int[Tensor, "b t"]) -> float | None:
        """On a GPU every call is waited for, so that the time is the call's own; a graph has no calls in it."""
        if self.contender.graph:
            return None
        spent = 0.0

        def watch(function: Callable[..., Any]) -> Callable[..., Any]:
            @wraps(function)
            def watched(*args: Any, **kwargs: Any) -> Any:
                nonlocal spent
                started = clock(self._device)
                result = function(*args, **kwargs)
                spent += clock(self._device) - started
                return result

            return watched

        self._cache.update = watch(self._cache.update)
        try:
            with watched_attention(self._model, watch):
                total = self.decode(ids)
        finally:
            del self._cache.update
        return spent / total

    def held(self) -> Held:
        """By the storage of its tensors."""
        if self.contender.kind == HEADWISE:
            report = self._cache.report()
            return Held(report.used_bytes, report.allocated_bytes, float(report.kept_ratio))
        held = held_by(self._cache)
        return Held(held.used_bytes, held.allocated_bytes, 1.0)

    def kernel_speed(self) -> KernelSpeed | None:
        """Over the pages as they are now."""
        if self.contender.kind != HEADWISE:
            return None
        with torch.inference_mode():
            return measure_kernel(self._cache, self._group, last_level_cache(self._device))

    def drop(self) -> None:
        """Let go of the cache."""
        self._cache = self._graph = None

    def close(self) -> None:
        """Drop the cache and its model."""
        self.drop()
        self._model = None

    def _forward(self, ids: Int[Tensor, "b t"]) -> Any:
        return self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, **self._last_logits_only)

    def _new_cache(self) -> Any:
        if self.contender.policy is not None:
            from headwise.hosts.transformers.cache import HeadwiseCache

            return HeadwiseCache(
                self._model,
                self.contender.policy,
                tokenizer=self._tokenizer,
                kernel=self._plan.kernel,
                evict_every=self._plan.evict_every,
                cache_dtype=self.contender.rows,
            )
        if self.contender.kind == QUANTIZED:
            return quantized_cache(self._model, str(self.contender.backend))
        return dynamic_cache(self._model)


def free_memory() -> None:
    """Give back what closed runs held: caches and models refer to each other in circles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
