"""Passages: texts as tokens -> the pieces of them that kernels learn from, and those that check what was learnt."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from headwise.errors import InputError

# Of every text, its end: nothing of it is learnt from.
_CHECKED = 0.1

# A text must have room for a prompt of so many: of less, hardly anything is evicted.
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


def draw_passages(lengths: Sequence[int], count: int, prompts: tuple[int, int], rows: int, seed: int) -> list[Passage]:
    """Random passages, of every text as many; every tenth is from the end of a text, where no other is.

    Lengths of prompts are spread evenly over a scale of doublings: short prompts show evictions one after the other,
    long ones many at once. A text that is too short for the shortest has shorter ones.

    Args:
        lengths: tokens of every text.
        prompts: tokens of the shortest and of the longest prompt.
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
        room = min(prompts[1], last - first - rows)
        least = min(prompts[0], room)
        prompt = round(least * (room / least) ** draw.random())
        passages.append(Passage(text, draw.randint(first, last - rows - prompt), prompt, checks))
    return passages
