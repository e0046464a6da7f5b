"""Haystack: a seed and a number of tokens -> made-up text of about that length: noise, or words to be counted."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise

from transformers import PreTrainedTokenizerBase

from headwise.errors import ConfigurationError

_ADJECTIVES = ("old", "quiet", "green", "narrow", "heavy", "bright", "wooden", "distant", "small", "curious")
_NOUNS = ("river", "garden", "train", "painter", "kitchen", "window", "forest", "letter", "island", "clock", "teacher")
_VERBS = ("passes", "follows", "remembers", "faces", "borrows", "hides", "repairs", "praises", "avoids", "watches")

_CONSONANTS, _VOWELS, _SYLLABLES = "bdfgklmnprstvz", "aeiou", 3

# How many times as often common words occur as the others: 30 and 3 in RULER.
_COMMONER = 10
# Exponent of the law (RULER, section 3.3), and the words that can occur: the 50th has a share of 1 in 4,000.
_ZIPF, _RANKS = 2.0, 50


def token_count(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Tokens of a text that stands inside a longer one."""
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def noise(tokenizer: PreTrainedTokenizerBase, rng: random.Random, tokens: int) -> str:
    """Sentences that mean nothing."""
    sentences: list[str] = []
    while tokens > 0:
        first, second = rng.sample(_NOUNS, 2)
        sentences.append(
            f"The {rng.choice(_ADJECTIVES)} {first} {rng.choice(_VERBS)} the {rng.choice(_ADJECTIVES)} {second}."
        )
        tokens -= token_count(tokenizer, f" {sentences[-1]}")
    return " ".join(sentences)


def made_words(rng: random.Random, count: int) -> list[str]:
    """Different words that can be spoken and are in no dictionary."""
    words: dict[str, None] = {}
    draw = _draw_words(rng)
    while len(words) < count:
        words[next(draw)] = None
    return list(words)


def word_list(
    tokenizer: PreTrainedTokenizerBase, rng: random.Random, tokens: int, common: int
) -> tuple[str, list[str]]:
    """Words in random order, half of the text taken by `common` ones that occur ten times as often as the others.

    Returns:
        the text, and the common words.

    Raises:
        ConfigurationError: when the text is too short to tell them apart.
    """
    words = made_words(rng, common)
    often = tokens // 2 // sum(_cost(tokenizer, word) for word in words)
    seldom = max(1, often // _COMMONER)
    if often <= seldom:
        raise ConfigurationError(f"a context of {tokens} tokens is too short for common words; take more")
    drawn, room = dict.fromkeys(words, often), tokens - tokens // 2
    for word in _draw_words(rng):
        if room <= 0:
            break
        if word not in drawn:
            drawn[word] = seldom
            room -= seldom * _cost(tokenizer, word)
    return _shuffled(rng, drawn), words


def zipf_words(tokenizer: PreTrainedTokenizerBase, rng: random.Random, tokens: int) -> tuple[str, list[str]]:
    """Words in random order, the k-th of them as often as k to the minus second power says.

    Returns:
        the text, and its words that occur more often than the next, the most frequent first.
    """
    words = made_words(rng, _RANKS)
    weights = [rank**-_ZIPF for rank in range(1, _RANKS + 1)]
    scale = tokens / sum(weight * _cost(tokenizer, word) for weight, word in zip(weights, words, strict=True))
    counts = [int(scale * weight) for weight in weights]
    # As far as no two are equally frequent.
    pairs = pairwise([*counts, 0, 0])
    ranked = next(rank for rank, (count, following) in enumerate(pairs) if count == following)
    return _shuffled(rng, dict(zip(words, counts, strict=True))), words[:ranked]


def _draw_words(rng: random.Random) -> Iterator[str]:
    while True:
        yield "".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(_SYLLABLES))


def _cost(tokenizer: PreTrainedTokenizerBase, word: str) -> int:
    """Tokens of a word of a text."""
    return token_count(tokenizer, f" {word}")


def _shuffled(rng: random.Random, counts: dict[str, int]) -> str:
    text = [word for word, count in counts.items() for _ in range(count)]
    rng.shuffle(text)
    return " ".join(text)
