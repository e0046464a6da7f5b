"""Whole model: all layers -> compacted at once, and chosen from again, where a policy decides over the model.

Some of these let the model repeat its prompt before; the ids for that are collected here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from weakref import WeakMethod

import torch

from headwise.errors import InputError
from headwise.policies.base import Policy
from headwise.stages.ambient import alone
from headwise.stages.compact import compact
from headwise.stages.layer import LayerCache
from headwise.types import Int, Tensor
from headwise.units import clock


class WholeModel:
    """What a cache needs for that.

    Args:
        policy: that chooses.
        cores: the compressed layers.
        repeat: lets the model repeat those ids, the first of which is in that column; held weakly, as it belongs to
            the cache.

    Attributes:
        repeating: whether the passes that come in are such repetitions.
        seconds: time they took.
    """

    def __init__(
        self, policy: Policy, cores: Sequence[LayerCache], repeat: WeakMethod[Callable[[Int[Tensor, "b t"], int], None]]
    ) -> None:
        self._policy, self._cores, self._repeat = policy, cores, repeat
        self.reset()

    def reset(self) -> None:
        """Ready for another prompt."""
        # Of the prompt as far as it is in; of what followed, those of the last pass where it is to be repeated.
        self._ids: Int[Tensor, "b t"] | None = None
        self._first = 0
        self.repeating = False
        self.seconds = 0.0

    @alone
    def take_in(self, input_ids: Int[Tensor, "b q"] | None) -> None:
        """Remember a part of the prompt, or a further one, where the policy is going to ask for it.

        A further one is a pass that brings as many tokens as are between two choices.

        Raises:
            InputError: when it does ask for a part of the prompt and there are no ids.
        """
        if not self._policy.needs_repetition:
            return
        if self._cores[0].plan is not None:
            again, recording = self._policy.again, self._cores[0].recording
            further = input_ids is not None and again is not None and input_ids.shape[1] >= again.every
            self._ids, self._first = input_ids if further and not recording else None, self._cores[0].seen
            return
        if input_ids is None:
            raise InputError(
                f"{self._policy.name} lets the model repeat its prompt, but the model was called without input_ids; "
                "pass input_ids, not inputs_embeds"
            )
        earlier = [] if self._ids is None else [self._ids]
        self._ids = torch.cat([*earlier, input_ids.detach()], dim=1)

    @alone
    def choose(self, spare: int | None = None) -> None:
        """Choose for all layers at once, where the policy decides so and it is time.

        That is when the whole prompt is in, and again when enough tokens have come.

        Args:
            spare: rows that are going to be appended before the next time; None for as many as come until then.

        Raises:
            InputError: when the prompt had tokens without ids.
        """
        if not self._policy.needs_all_layers or not self._cores:
            return
        if all(core.prompt.complete for core in self._cores):
            self._compact()
            return
        # Not where that pass was refused.
        if self._ids is not None and self._first and self._cores[0].seen == self._first + self._ids.shape[1]:
            self._repeat_ids()
        if self._policy.again is not None and all(core.choice_is_due for core in self._cores):
            summaries = [core.summarise_rows() for core in self._cores]
            choices = self._policy.choose_again(summaries)
            for core, summary, choice in zip(self._cores, summaries, choices, strict=True):
                due = self._policy.again.interval(core.seen)
                core.keep_chosen(summary, choice, due if spare is None else spare)

    def _compact(self) -> None:
        cores = self._cores
        if self._ids is not None:
            if self._ids.shape[1] < cores[0].seen:
                raise InputError(
                    f"{self._policy.name} lets the model repeat its prompt, but of {cores[0].seen} tokens only "
                    f"{self._ids.shape[1]} have ids, as where an adapter puts virtual tokens before the prompt; take a "
                    "policy that repeats nothing"
                )
            self._repeat_ids()
        for core, chosen in zip(cores, compact(self._policy, [core.prompt for core in cores]), strict=True):
            core.go_on_with(*chosen)

    def _repeat_ids(self) -> None:
        assert self._ids is not None
        ids, self._ids = self._ids[:, : self._cores[0].seen - self._first], None
        started = clock(ids.device)
        self.repeating = True
        try:
            repeat = self._repeat()
            assert repeat is not None
            repeat(ids, self._first)
        finally:
            self.repeating = False
        self.seconds += clock(ids.device) - started
