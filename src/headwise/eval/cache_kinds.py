"""Cache kinds: a policy, or transformers' quantized cache in words -> what makes a run's cache, and reports on it."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, replace
from typing import Any

from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from headwise.errors import ConfigurationError
from headwise.hosts.transformers.cache import HeadwiseCache
from headwise.hosts.transformers.model_facts import read_facts
from headwise.measure.stock_caches import held_by, quantized_cache
from headwise.policies import Full, Policy
from headwise.policies.words import describe_policy
from headwise.report.report import Report

_PREFIX = "transformers:"


class CacheKind(ABC):
    """What kind of cache an item is measured with. Two that are equal measure the same."""

    @abstractmethod
    def make(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompt_tokens: int,
        options: dict[str, Any],
    ) -> Cache:
        """An empty one.

        Args:
            prompt_tokens: how many are compressed; what follows is not.
            options: of every `HeadwiseCache`.

        Raises:
            ConfigurationError: when this release of transformers or the model does not take it.
        """

    @abstractmethod
    def report(self, model: PreTrainedModel, cache: Any, tokens: int) -> Report:
        """What a cache that `make` made holds, once one sequence of so many tokens has been read."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Plain values."""


@dataclass(frozen=True)
class PolicyCache(CacheKind):
    """A `HeadwiseCache` with that policy."""

    policy: Policy

    def make(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompt_tokens: int,
        options: dict[str, Any],
    ) -> HeadwiseCache:
        """Its length is told, or a question that follows the prompt would be taken for the rest of it."""
        return HeadwiseCache(model, self.policy, tokenizer=tokenizer, prompt_tokens=prompt_tokens, **options)

    def report(self, model: PreTrainedModel, cache: HeadwiseCache, tokens: int) -> Report:
        """The cache's own."""
        return cache.report()

    def describe(self) -> dict[str, Any]:
        """The policy's name and parameters."""
        return describe_policy(self.policy)


FULL_CACHE = PolicyCache(Full())


@dataclass(frozen=True)
class StockQuantized(CacheKind):
    """transformers' `QuantizedCache`.

    It keeps every token, codes the prompt at its end, and codes all rows anew whenever 128 more have come.

    Args:
        backend: quanto, hqq or fp8.
        bits: of a number; None for a backend that has no choice.
    """

    backend: str
    bits: int | None = None

    def __str__(self) -> str:
        bits = "" if self.bits is None else f", bits={self.bits}"
        return f"StockQuantized(backend={self.backend!r}{bits})"

    def make(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompt_tokens: int,
        options: dict[str, Any],
    ) -> Cache:
        """With transformers' own defaults."""
        return quantized_cache(model, self.backend, self.bits)

    def report(self, model: PreTrainedModel, cache: Cache, tokens: int) -> Report:
        """All layers are one here, and times are not known."""
        full = tokens * read_facts(model)[0].token_bytes(model.dtype)
        return Report(str(self), tokens, [replace(held_by(cache), full_bytes=full)], 0, "", 0.0, 0.0)

    def describe(self) -> dict[str, Any]:
        """As policies are described."""
        return {"name": "transformers", "parameters": asdict(self)}


def parse_stock(spec: str) -> StockQuantized | None:
    """The cache that such words as `transformers:quanto-int4` stand for; None for a policy of headwise.

    Raises:
        ConfigurationError: for a backend or bits that cannot be.
    """
    if not spec.startswith(_PREFIX):
        return None
    found = re.fullmatch(r"(quanto|hqq)-int([1-8])|(fp8)", spec.removeprefix(_PREFIX))
    if found is None:
        raise ConfigurationError(f"{_PREFIX} takes quanto-int4, hqq-int8 and the like, or fp8, got {spec!r}")
    backend, bits, fp8 = found.groups()
    return StockQuantized(fp8 or backend, None if fp8 else int(bits))
