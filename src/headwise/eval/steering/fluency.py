"""Fluency: a text -> how little it repeats itself, in bits."""

from __future__ import annotations

import math
import re
from collections import Counter

_TOKEN = re.compile(r"\w+|[^\w\s]")


def fluency(text: str) -> float:
    """A third of the entropy of its pairs of words and two thirds of that of its triples, in bits.

    As the program of PASTA's authors has it (Zhang et al., ICLR 2024, section 4, after Meng et al. 2022). Long texts
    can have more of it than short ones; one with fewer than two words has none.
    """
    words = _TOKEN.findall(text)
    return _entropy(words, 2) / 3 + 2 * _entropy(words, 3) / 3


def _entropy(words: list[str], size: int) -> float:
    counts = Counter(zip(*(words[at:] for at in range(size)), strict=False))
    total = counts.total()
    return sum(count / total * math.log2(total / count) for count in counts.values())
