"""Door: sampling parameters -> what the request is to have of its prompt, or why it cannot; and where its row is.

vLLM asks logits processors whether they take a request, before it is let in, and tells them which request is in which
row of a batch. This one leaves the logits as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from headwise.errors import HeadwiseError
from headwise.hosts.vllm.engine import ENGINE, RESUMABLE, UNKNOWN
from headwise.hosts.vllm.options import KEY, POLICY, RATIO, Options, options_of
from headwise.types import Tensor

# That of the newer model runner too, where there is one: it does not start with processors of the former kind. Requests
# are not compressed by it, so that nothing is done there.
_INTERFACES: tuple[type, ...] = (LogitsProcessor,)
with contextlib.suppress(ImportError):
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as NewerLogitsProcessor

    _INTERFACES = (LogitsProcessor, NewerLogitsProcessor)


@dataclass(frozen=True)
class Row:
    """A compressed request in a batch.

    Attributes:
        ids: of its prompt's tokens.
    """

    options: Options
    ids: Sequence[int]

    @property
    def tokens(self) -> int:
        """Of its prompt."""
        return len(self.ids)


# Of the batch that this process computes, by index; rows that are not compressed are left out.
ROWS: dict[int, Row] = {}


class Door(*_INTERFACES):  # type: ignore[misc]  # as many as there are
    """Refuses what cannot be served, and keeps `ROWS`."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Write down in the request what holds for it.

        Raises:
            ValueError: saying why it cannot be served; vLLM answers with status 400.
        """
        try:
            engine = ENGINE.get() or UNKNOWN
            # What holds for all does not hold for a prompt that comes in parts.
            default = None if RESUMABLE.get() else engine.default
            options = options_of(sampling_params.extra_args, default)
            if options is not None:
                engine.check(options)
        except HeadwiseError as error:
            raise ValueError(str(error)) from error
        if options is None:
            return
        said = (sampling_params.extra_args or {}).items()
        others = {name: value for name, value in said if name not in (POLICY, RATIO)}
        sampling_params.extra_args = {**others, KEY: options.to_dict()}
        # Its blocks are rewritten, and must be nobody else's.
        sampling_params.skip_reading_prefix_cache = True

    def __init__(self, vllm_config: Any, *given: Any) -> None:
        ROWS.clear()

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Asked by the newer runner: no logits are changed."""
        return False

    def is_argmax_invariant(self) -> bool:
        """Logits stay as they are."""
        return True

    def apply(self, logits: Tensor, *given: Any) -> Tensor:
        """As they are."""
        return logits

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the requests of a batch: some leave, some come, some move."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            ROWS.pop(index, None)
        for index, params, prompt, _ in batch_update.added:
            ROWS.pop(index, None)
            options = options_of(params.extra_args)
            if options is not None and prompt is not None:
                ROWS[index] = Row(options, prompt)
        for one, other, direction in batch_update.moved:
            moved, back = ROWS.pop(one, None), ROWS.pop(other, None)
            if moved is not None:
                ROWS[other] = moved
            if back is not None and direction == MoveDirectionality.SWAP:
                ROWS[one] = back
