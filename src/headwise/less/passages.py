"""Passages: texts as tokens -> the pieces of them that kernels learn from, and those that check what was learnt."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from headwise.errors import InputError

# Of every text, its end: nothing of it is learnt from.
_CHECKED = 0.1

# Prompts of fewer tokens teach nothing: nothing is evicted.
_SHORTEST = 64


@dataclass(frozen=True)
class Passage:
    """A part of a text.

    Attributes:
        text: number of the text.
        start: its first token.
        prompt: how many tokens are read at once; what follows them is asked token by token.
        checks: whether it is kept apart from what is learnt.
    """

    text: int
    start: int
    prompt: int
    checks: bool


def draw_passages(lengths: Sequence[int], count: int, longest: int, rows: int, seed: int) -> list[Passage]:
    """Random passages, of every text as many; every tenth is from the end of a text, where no other is.

    Prompts have lengths up to `longest`, and short ones are as frequent as long ones on a scale of doublings: short
    ones show evictions one after the other, long ones many at once.

    Args:
        lengths: tokens of every text.
        rows: tokens after the prompt.

    Raises:
        InputError: when no text is long enough.
    """
    draw = random.Random(seed)
    parts = {
        False: [(0, round(n * (1 - _CHECKED))) for n in lengths],
        True: [(round(n * (1 - _CHECKED)), n) for n in lengths],
    }
    passages = []
    for number in range(count):
        checks = number % round(1 / _CHECKED) == round(1 / _CHECKED) - 1
        spans = [
            (text, first, last) for text, (first, last) in enumerate(parts[checks]) if last - first > rows + _SHORTEST
        ]
        if not spans:
            wanted = round((rows + _SHORTEST) / _CHECKED)
            raise InputError(
                f"the texts are too short to learn from: one must have {wanted:,} tokens, got {max(lengths):,}"
            )
        text, first, last = draw.choice(spans)
        room = min(longest, last - first - rows)
        prompt = round(_SHORTEST * (room / _SHORTEST) ** draw.random())
        passages.append(Passage(text, draw.randint(first, last - rows - prompt), prompt, checks))
    return passages
