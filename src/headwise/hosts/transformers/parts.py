"""Parts: what a cache consists of -> what is done to all of it: its layers, and what it knows of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from headwise.errors import CacheStateError, InputError
from headwise.hosts.transformers.kinds import KindTable
from headwise.hosts.transformers.layer import HeadwiseLayer, layer_report
from headwise.report.report import Report
from headwise.report.steered import Steered
from headwise.report.words import asked_words
from headwise.stages.admit import check_select
from headwise.stages.layer import LayerCache
from headwise.stages.token_log import TokenLog
from headwise.types import Int, Tensor
from headwise.units import storage_bytes


@dataclass
class CacheParts:
    """The parts of one cache.

    Attributes:
        layers: headwise's and transformers' own, in the order of the model.
        log: of the tokens.
        kinds: what it takes tokens for, where the policy asks.
        newest: the last token of every sequence, where it is known.
    """

    layers: Sequence[CacheLayerMixin]
    log: TokenLog
    kinds: KindTable | None
    newest: Int[Tensor, " b"] | None = None

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
        return [*self.log.tensors().values(), *(each for each in (ids, self.newest) if each is not None)]

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
            steering=Steered.of(self.cores, self.log.marks),
            asked=next((asked_words(core.config.policy, core.config.again) for core in self.cores), None),
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

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest `-tokens_to_remove` tokens from all layers, or from none when one of them cannot.

        Raises:
            InputError: for a positive number.
            CacheStateError: when those tokens have already had an effect that cannot be undone.
        """
        for layer in self.compressed:
            layer.check_crop(tokens_to_remove)
        # Stock layers that refuse do so at once: they come first. Those that have seen nothing may crash.
        for number, layer in enumerate(layer for layer in self.stock if getattr(layer, "is_initialized", True)):
            try:
                layer.crop(tokens_to_remove)
            except RuntimeError as error:
                if number:
                    raise
                raise CacheStateError(
                    f"cannot remove {-tokens_to_remove} tokens: layers that keep transformers' own cache have let go "
                    "of what came before them; reset() the cache and start again"
                ) from error
        for layer in self.compressed:
            layer.crop(tokens_to_remove)
        self.truncate()

    def check_select(self, indices: Tensor) -> None:
        """Refuse a choice of sequences before anything of it is done.

        Raises:
            InputError: when there are no such sequences.
            CacheStateError: while the prompt is still coming in.
        """
        for core in self.cores:
            core.accept()
            if core.prompt.rows.begun:
                raise CacheStateError("cannot select sequences while the prompt is still coming in")
            if core.store is not None:
                check_select(indices, core.store.heads[0])

    def repeated(self, repeats: int) -> Int[Tensor, " new"]:
        """Indices that name every sequence so many times.

        Raises:
            InputError: for less than none.
        """
        if not isinstance(repeats, int) or repeats < 0:
            raise InputError(f"sequences are repeated 0 times or more, got {repeats!r}")
        batch = next((core.store.heads[0] for core in self.cores if core.store is not None), 0)
        return torch.arange(batch, device="cpu").repeat_interleave(repeats)

    def select(self, indices: Int[Tensor, " new"]) -> None:
        """Keep what is known of the sequences at `indices`, in that order."""
        self.log.select(indices)
        if self.kinds is not None:
            self.kinds.select(indices)


class OfParts:
    """What a cache has of its parts."""

    _parts: CacheParts

    @property
    def headwise_layers(self) -> list[HeadwiseLayer]:
        """The compressed layers, in the order of the model."""
        return self._parts.compressed

    @property
    def newest(self) -> Int[Tensor, " b"] | None:
        """The last token of every sequence, where it is known."""
        return self._parts.newest

    @newest.setter
    def newest(self, ids: Int[Tensor, " b"] | None) -> None:
        self._parts.newest = ids

    @property
    def awaits_attention(self) -> bool:
        """Whether a layer has new keys that no attention has been computed for."""
        return any(layer.awaits_attention for layer in self.headwise_layers)
