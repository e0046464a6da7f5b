"""Greedy: a context in a compressed cache -> the likeliest tokens that follow it."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from headwise.eval.task import Context, Subject


def continue_greedily(subject: Subject, context: Context, limit: int) -> list[int]:
    """At most `limit` new tokens of a single sequence; one that ends the text is the last.

    The model's own settings for generation, such as a penalty on repetition, have no part in it.
    """
    ends = end_ids(getattr(subject.model, "generation_config", None), subject.tokenizer)
    new: list[int] = []
    logits = context.logits
    with torch.inference_mode():
        while len(new) < limit and not ends.intersection(new[-1:]):
            if new:
                step = torch.tensor([new[-1:]], device=subject.model.device)
                logits = subject.model(input_ids=step, past_key_values=context.cache).logits[:, -1]
            new.append(int(logits.argmax()))
    return new


def end_ids(generation: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end a text, by a model's settings and its tokenizer's."""
    stated = [getattr(generation, "eos_token_id", None), tokenizer.eos_token_id]
    return {int(end) for ends in stated if ends is not None for end in (ends if isinstance(ends, list) else [ends])}


def common_prefix(one: Iterable[int], other: Iterable[int]) -> int:
    """How many tokens two texts have in common before the first in which they differ."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
