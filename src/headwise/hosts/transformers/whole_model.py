"""Together: a prompt that is in all layers -> all of them compacted at once, for policies that decide over the model.

Some of these let the model repeat its prompt before; the ids for that are collected here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from headwise.errors import InputError
from headwise.hosts.transformers.repetition import repeat_prompt
from headwise.policies.scored import Scored
from headwise.stages.prompt import compact
from headwise.types import Int, Tensor
from headwise.units import clock

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from headwise.hosts.transformers.cache import HeadwiseCache


class Together:
    """What a cache needs for that.

    Args:
        tokenizer: words the request to repeat the prompt; None where the policy does not want it repeated.

    Attributes:
        repeating: whether the passes that come in are such repetitions.
        seconds: time they took.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._tokenizer = tokenizer
        self.reset()

    def reset(self) -> None:
        """Ready for another prompt."""
        self._ids: Int[Tensor, "b t"] | None = None
        self.repeating = False
        self.seconds = 0.0

    def take_in(self, cache: HeadwiseCache, input_ids: Int[Tensor, "b q"] | None) -> None:
        """Remember a part of the prompt, where the policy is going to ask for it.

        Raises:
            InputError: when it does and there are no ids.
        """
        if not _repeats(cache) or cache.headwise_layers[0].core.plan is not None:
            return
        if input_ids is None:
            raise InputError(
                f"{cache.policy.chooser.name} lets the model repeat its prompt, but the model was called without "
                "input_ids; pass input_ids, not inputs_embeds"
            )
        earlier = [] if self._ids is None else [self._ids]
        self._ids = torch.cat([*earlier, input_ids.detach()], dim=1)

    def compact(self, cache: HeadwiseCache) -> None:
        """Choose for all layers at once, where the policy decides so and the whole prompt is in."""
        cores = [layer.core for layer in cache.headwise_layers]
        if not cache.policy.chooser.deferred or not cores or not all(core.prompt.complete for core in cores):
            return
        if self._tokenizer is not None and self._ids is not None and _repeats(cache):
            started = clock(cache.model.device)
            self.repeating = True
            try:
                repeat_prompt(cache, self._ids[:, : cores[0].seen], self._tokenizer)
            finally:
                self.repeating = False
            self._ids = None
            self.seconds = clock(cache.model.device) - started
        for core, (plan, store) in zip(
            cores, compact(cache.policy.chooser, [core.prompt for core in cores]), strict=True
        ):
            core.take(plan, store)


def _repeats(cache: HeadwiseCache) -> bool:
    return isinstance(cache.policy.chooser, Scored) and cache.policy.chooser.reconstructs
