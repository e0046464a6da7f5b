"""Forced: a request that lists its first tokens -> exactly those are written; what the model thought of them is told.

For measuring (`headwise eval --server`), started by `--logits-processors headwise.hosts.vllm.forced:Forced`. Tokens
behind a prompt are the only ones that see what was chosen of it; log-probabilities are the model's own, as vLLM notes
them before logits are changed (`logprobs_mode`, raw by default).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from headwise.hosts.vllm.options import FORCED
from headwise.types import Float, Tensor


@dataclass(frozen=True)
class _Text:
    """What a request is to write.

    Attributes:
        ids: its first tokens.
        written: so far, which grows.
    """

    ids: Sequence[int]
    written: Sequence[int]


class Forced(LogitsProcessor):
    """Leaves one token to choose from while a request has one to write."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse what is no list of token ids.

        Raises:
            ValueError: saying what it is.
        """
        ids = (sampling_params.extra_args or {}).get(FORCED)
        whole = isinstance(ids, list) and all(isinstance(id, int) and id >= 0 for id in ids)
        if ids is not None and not whole:
            raise ValueError(f"{FORCED} must be a list of token ids, got {ids!r}")

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        self._texts: dict[int, _Text] = {}

    def is_argmax_invariant(self) -> bool:
        """It decides."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the requests of a batch."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._texts.pop(index, None)
        for index, params, _, written in batch_update.added:
            self._texts.pop(index, None)
            ids = (params.extra_args or {}).get(FORCED)
            if ids:
                self._texts[index] = _Text(ids, written)
        for one, other, direction in batch_update.moved:
            moved, back = self._texts.pop(one, None), self._texts.pop(other, None)
            if moved is not None:
                self._texts[other] = moved
            if back is not None and direction == MoveDirectionality.SWAP:
                self._texts[one] = back

    def apply(self, logits: Float[Tensor, "n vocabulary"]) -> Float[Tensor, "n vocabulary"]:
        """Every other token out of question."""
        for index, text in self._texts.items():
            place = len(text.written)
            if place < len(text.ids):
                id = min(int(text.ids[place]), logits.shape[1] - 1)
                logits[index] = -torch.inf
                logits[index, id] = 0
        return logits
