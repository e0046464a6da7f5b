"""ROUGE-L: two texts -> how much of their words they share in the same order."""

from __future__ import annotations

import re

from headwise.errors import ConfigurationError

_WORD = re.compile(r"\w+")


def rouge_l(one: str, other: str) -> float:
    """F-measure of the longest common subsequence of words, from 0 to 1 (Lin 2004, section 3.1, with beta 1).

    Words are runs of letters and digits, whatever their case; they are not stemmed. Two texts without any word
    score 1.

    Raises:
        ConfigurationError: when rapidfuzz is not installed.
    """
    try:
        from rapidfuzz.distance import LCSseq
    except ImportError as error:
        raise ConfigurationError("ROUGE-L needs rapidfuzz: pip install 'headwise[eval]'") from error
    left, right = _WORD.findall(one.lower()), _WORD.findall(other.lower())
    if not left and not right:
        return 1.0
    # Harmonic mean of common/left and common/right.
    return 2 * LCSseq.similarity(left, right) / (len(left) + len(right))
