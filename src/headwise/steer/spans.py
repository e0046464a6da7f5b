"""Spans: a text and what a user marks in it -> ranges of characters, and of the tokens that hold them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from headwise.errors import InputError

# Characters of a text that a message quotes.
_QUOTED = 60


@dataclass(frozen=True)
class Span:
    """A part of a text.

    Args:
        text: what is marked.
        occurrence: which of the places where the text is, from 1; None for all of them.
    """

    text: str
    occurrence: int | None = 1


@dataclass(frozen=True)
class TokenRange:
    """Tokens of a text from `start` up to, but not including, `stop`, counted without padding."""

    start: int
    stop: int


# What may be marked: a text (its first occurrence), a text with an occurrence, characters from and up to, or tokens.
SpanLike = str | Span | tuple[int, int] | TokenRange


@dataclass(frozen=True)
class Marked:
    """What is marked in the tokens that a model is going to read.

    Attributes:
        spans: of each sequence the ranges of columns, from and up to, padding counted; none where nothing is marked.
        columns: of the ids up to their end. Columns from there on are what the model generates, until more is marked.
    """

    spans: tuple[tuple[tuple[int, int], ...], ...]
    columns: int

    def __post_init__(self) -> None:
        for ranges in self.spans:
            for start, stop in ranges:
                if not 0 <= start < stop <= self.columns:
                    raise InputError(f"tokens {start} to {stop} are marked, and there are {self.columns}")


def character_ranges(text: str, span: str | Span | tuple[int, int]) -> list[tuple[int, int]]:
    """Where a span lies in a text, from and up to.

    Raises:
        InputError: when it is not in the text, saying what is most like it, or is empty.
    """
    if isinstance(span, tuple):
        start, stop = span
        if not 0 <= start < stop <= len(text):
            raise InputError(f"characters {start} to {stop} are marked, and the text has {len(text)}")
        return [(start, stop)]
    if isinstance(span, str):
        span = Span(span)
    if not span.text:
        raise InputError("an empty text cannot be marked")
    found, at = [], text.find(span.text)
    while at >= 0:
        found.append((at, at + len(span.text)))
        at = text.find(span.text, at + len(span.text))
    if not found:
        raise InputError(f"{_quoted(span.text)} is not in the text{_nearest(text, span.text)}")
    if span.occurrence is None:
        return found
    if not 1 <= span.occurrence <= len(found):
        raise InputError(
            f"{_quoted(span.text)} is in the text {len(found)} times, and number {span.occurrence} is marked"
        )
    return [found[span.occurrence - 1]]


def token_ranges(offsets: Sequence[tuple[int, int]], characters: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The tokens that hold any of those characters, as ranges that neither touch nor overlap.

    Args:
        offsets: of every token the characters that it stands for, from and up to; nothing for padding and for tokens
            that a tokenizer puts beside the text.

    Raises:
        InputError: when a range of characters lies in no token.
    """
    marked: set[int] = set()
    for start, stop in characters:
        own = {i for i, (first, last) in enumerate(offsets) if max(first, start) < min(last, stop)}
        if not own:
            raise InputError(f"characters {start} to {stop} are in no token")
        marked |= own
    return joined([(i, i + 1) for i in marked])


def joined(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same numbers in ranges that neither touch nor overlap, in order."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if found and start <= found[-1][1]:
            start, stop = found[-1][0], max(found.pop()[1], stop)
        found.append((start, stop))
    return found


def _nearest(text: str, wanted: str) -> str:
    """What of the text is most like that, in words; nothing where nothing is like it."""
    matcher = difflib.SequenceMatcher(None, text.lower(), wanted.lower(), autojunk=False)
    match = matcher.find_longest_match()
    if match.size < min(4, len(wanted)):
        return ""
    start = max(0, match.a - match.b)
    return f"; nearest is {_quoted(text[start : start + len(wanted)])}"


def _quoted(text: str) -> str:
    return repr(text if len(text) <= _QUOTED else f"{text[: _QUOTED - 3]}...")
