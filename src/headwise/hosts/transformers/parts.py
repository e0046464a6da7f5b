"""Parts: what a cache consists of -> what is done to all of it: its layers, and what it knows of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers.cache_utils import CacheLayerMixin

from headwise.hosts.transformers.kinds import KindTable
from headwise.hosts.transformers.layer import HeadwiseLayer, layer_report
from headwise.report.report import Report
from headwise.stages.layer import LayerCache
from headwise.stages.token_log import TokenLog
from headwise.types import Int, Tensor
from headwise.units import storage_bytes


@dataclass(frozen=True)
class CacheParts:
    """The parts of one cache.

    Attributes:
        layers: headwise's and transformers' own, in the order of the model.
        log: of the tokens.
        kinds: what it takes tokens for, where the policy asks.
    """

    layers: Sequence[CacheLayerMixin]
    log: TokenLog
    kinds: KindTable | None

    @property
    def compressed(self) -> list[HeadwiseLayer]:
        """The layers that are headwise's."""
        return [layer for layer in self.layers if isinstance(layer, HeadwiseLayer)]

    @property
    def cores(self) -> list[LayerCache]:
        """What does their work."""
        return [layer.core for layer in self.compressed]

    @property
    def stock(self) -> list[CacheLayerMixin]:
        """The layers that stay as transformers made them."""
        return [layer for layer in self.layers if not isinstance(layer, HeadwiseLayer)]

    @property
    def states(self) -> list[dict[Any, Any]]:
        """What passes change beside rows that are headwise's: stock layers as a whole, and states of hybrid ones."""
        beside = [part for layer in self.compressed for part in vars(layer).values() if isinstance(part, dict)]
        return [vars(layer) for layer in self.stock] + beside

    def token_tensors(self) -> list[Tensor]:
        """What is known of tokens beside their rows."""
        ids = None if self.kinds is None else self.kinds.ids
        return [*self.log.tensors().values(), *([] if ids is None else [ids])]

    def report(self, policy: str, kernel: str, seen: int, repetition_seconds: float) -> Report:
        """What they hold now, and what a full cache would hold, after so many tokens."""
        prompts = [core.prompt for core in self.cores]
        return Report(
            policy=policy,
            seen_tokens=seen,
            layers=[layer_report(layer) for layer in self.layers],
            transcript_bytes=storage_bytes(self.token_tensors()),
            kernel=kernel,
            profile_seconds=repetition_seconds + sum((prompt.profile_seconds for prompt in prompts), 0.0),
            compact_seconds=sum((prompt.compact_seconds for prompt in prompts), 0.0),
        )

    def announce(self, input_ids: Int[Tensor, "b q"] | None, seen: int) -> None:
        """Take note of the tokens of a pass that is about to begin, behind those seen."""
        if self.kinds is None:
            return
        if self.kinds.ids is not None and self.kinds.ids.shape[1] > seen:
            # Left behind by a pass that failed before its first layer.
            self.truncate()
        self.kinds.announce(input_ids, self.log)

    def truncate(self) -> None:
        """Forget what is known of tokens that the layers no longer have."""
        columns = self.compressed[0].core.seen if self.compressed else 0
        self.log.truncate(columns)
        if self.kinds is not None:
            self.kinds.truncate(columns, self.log)

    def select(self, indices: Int[Tensor, " new"]) -> None:
        """Keep what is known of the sequences at `indices`, in that order."""
        self.log.select(indices)
        if self.kinds is not None:
            self.kinds.select(indices)
