"""Stock: transformers' quantized cache in words, such as `transformers:quanto-int4` -> that cache, to compare with."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import ClassVar

from transformers import Cache, PreTrainedModel

from headwise.bench.stock import quantized_cache, tensors_of
from headwise.errors import ConfigurationError
from headwise.hosts.transformers.model_facts import read_facts
from headwise.policies.base import Policy, Rule
from headwise.report.report import LayerReport, Report

_PREFIX = "transformers:"


@dataclass(frozen=True)
class StockQuantized(Policy):
    """transformers' `QuantizedCache`, as a row of the tables; no `HeadwiseCache` can have it.

    It keeps every token, codes the prompt at its end, and codes all rows anew whenever 128 more have come.

    Args:
        backend: quanto, hqq or fp8.
        bits: of a number; None for a backend that has no choice.
    """

    name: ClassVar[str] = "transformers"

    backend: str
    bits: int | None = None

    @property
    def rungs(self) -> tuple[Rule, ...]:
        """There are none.

        Raises:
            ConfigurationError: always.
        """
        raise ConfigurationError(f"a HeadwiseCache cannot be {self.title}")

    @property
    def title(self) -> str:
        """What it is, in a few words."""
        bits = "" if self.bits is None else f", {self.bits} bits"
        return f"transformers' quantized cache ({self.backend}{bits})"

    def cache(self, model: PreTrainedModel) -> Cache:
        """An empty one.

        Raises:
            ConfigurationError: when this release of transformers, the backend or the model does not take it.
        """
        return quantized_cache(model, self.backend, self.bits)

    def report(self, model: PreTrainedModel, cache: Cache, tokens: int) -> Report:
        """What the cache of one sequence of so many tokens holds; all layers are one here, and times are not known."""
        held = LayerReport.of_stock(tensors_of(cache))
        full = tokens * read_facts(model)[0].token_bytes(model.dtype)
        return Report(str(self), tokens, [replace(held, full_bytes=full)], 0, "", 0.0, 0.0)


def parse_stock(spec: str) -> StockQuantized | None:
    """The cache that such words stand for; None for a policy of headwise.

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
