"""Contrasts: names and facts, or a file -> prompts with a marked span, and two answers of which one follows the mark.

Made of nothing but words in this file: somebody was or had one thing, and now is or has another (CounterFact in PASTA,
Zhang et al., ICLR 2024, section 4). Answers differ in their first token that is not the same, and only that is asked.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headwise.errors import ConfigurationError, InputError

# How a prompt is told: a fact that is over, the one that holds, and what then is asked.
NAMES = (
    *("Mary", "John", "Anna", "Peter", "Laura", "David", "Sarah", "Thomas", "Julia", "Robert", "Emma", "Daniel"),
    *("Clara", "Simon", "Helen", "Martin", "Alice", "George", "Nina", "Oliver", "Rosa", "Henry", "Lucy", "Frank"),
    *("Diana", "Victor", "Grace", "Samuel", "Irene", "Walter", "Maria", "Edward", "Sophie", "Albert", "Judith"),
)


@dataclass(frozen=True)
class _Kind:
    """A kind of facts.

    Attributes:
        values: that a fact may have.
        was, now: sentences about {name} and {value}; what is behind the name in the second is marked.
        asked: beginnings that the value completes; the first is asked for efficacy, the others are paraphrases.
    """

    values: tuple[str, ...]
    was: str
    now: str
    asked: tuple[str, ...]


_KINDS = {
    "occupation": _Kind(
        (
            *("dentist", "gardener", "painter", "lawyer", "pilot", "teacher", "nurse", "farmer", "baker", "singer"),
            *("plumber", "writer", "carpenter", "chemist", "banker", "tailor", "butcher", "judge", "sailor", "miner"),
        ),
        "Previously {name} worked as a {value}.",
        "Currently {name} works as a {value}.",
        ("{name} is a", "The profession of {name} is that of a", "For a living, {name} works as a"),
    ),
    "city": _Kind(
        (
            *("London", "Paris", "Berlin", "Madrid", "Rome", "Vienna", "Tokyo", "Boston", "Chicago", "Dublin"),
            *("Moscow", "Athens", "Lisbon", "Oslo", "Prague", "Cairo", "Sydney", "Toronto", "Seattle", "Denver"),
        ),
        "Previously {name} lived in {value}.",
        "Currently {name} lives in {value}.",
        ("{name} has a home in", "The city in which {name} lives is", "To visit {name} you have to go to"),
    ),
    "language": _Kind(
        (
            *("English", "French", "German", "Spanish", "Italian", "Russian", "Chinese", "Japanese", "Arabic", "Dutch"),
            *("Greek", "Polish", "Turkish", "Swedish", "Danish", "Korean", "Hebrew", "Hindi", "Latin", "Finnish"),
        ),
        "Previously {name} studied {value}.",
        "Currently {name} studies {value}.",
        ("{name} is learning", "The language that {name} studies is", "The lessons that {name} takes are in"),
    ),
    "instrument": _Kind(
        (
            *("piano", "violin", "guitar", "trumpet", "flute", "cello", "harp", "drums", "organ", "clarinet"),
            *("banjo", "saxophone", "trombone", "accordion", "mandolin", "oboe", "harmonica", "tuba", "lute", "bass"),
        ),
        "Previously {name} played the {value}.",
        "Currently {name} plays the {value}.",
        ("{name} is good at the", "The instrument that {name} plays is the", "On the stage {name} plays the"),
    ),
}


@dataclass(frozen=True)
class Contrast:
    """A prompt with a span that is marked, and two answers.

    Attributes:
        text: the prompt.
        spans: what is marked in it; each text stands for its last place.
        wanted: the answer that follows what is marked.
        unwanted: the one that does not.
        paraphrases: the same prompt with other words at its end.
        chat: whether the text is what a user asks, and the answers are whole ones. Else they go on with the text.
    """

    text: str
    spans: tuple[str, ...]
    wanted: str
    unwanted: str
    paraphrases: tuple[str, ...] = ()
    chat: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as a line of a file has them."""
        return asdict(self)

    @classmethod
    def of(cls, given: Any) -> Contrast:
        """Of plain values.

        Raises:
            InputError: when something is missing, or is no text.
        """
        if not isinstance(given, dict):
            raise InputError("a sample is a JSON object with text, spans, wanted and unwanted")
        texts: dict[str, Any] = {name: given.get(name) for name in ("text", "wanted", "unwanted")}
        lists: dict[str, Any] = {name: given.get(name, []) for name in ("spans", "paraphrases")}
        fits = all(isinstance(each, str) and each for each in texts.values()) and all(
            isinstance(each, list | tuple) and all(isinstance(part, str) for part in each) for each in lists.values()
        )
        if not fits or not lists["spans"]:
            raise InputError("a sample has text, wanted and unwanted, which are texts, and spans, a list of texts")
        if not isinstance(chat := given.get("chat", False), bool):
            raise InputError(f"chat is true or false, got {chat!r}")
        spans, paraphrases = tuple(lists["spans"]), tuple(lists["paraphrases"])
        return cls(texts["text"], spans, texts["wanted"], texts["unwanted"], paraphrases, chat)


# The fact that is marked comes first and once, another one behind it and several times, as if both held: a model goes
# on with what comes last and often.
_HARD, _REPEATED = "hard-", 3

FACTS = (*_KINDS, *(_HARD + name for name in _KINDS))


def values_of(kind: str) -> tuple[str, ...]:
    """What facts of a kind may say."""
    return _KINDS[kind].values


def made_contrasts(kind: str, count: int, seed: int) -> list[Contrast]:
    """So many samples of a kind, no two the same; those of another seed are others.

    Raises:
        ConfigurationError: when there is no such kind, or are not so many of it.
    """
    if kind not in FACTS:
        raise ConfigurationError(f"there is no kind {kind!r}; there are {', '.join(FACTS)}")
    hard, facts = kind.startswith(_HARD), _KINDS[kind.removeprefix(_HARD)]
    rng = random.Random(f"contrasts {kind} {seed}")
    found: dict[tuple[str, str, str], Contrast] = {}
    room = len(NAMES) * len(facts.values) * (len(facts.values) - 1)
    if not 0 < count <= room:
        raise ConfigurationError(f"there are {room:,} samples of a kind at most, and at least one is asked for")
    while len(found) < count:
        name, (old, new) = rng.choice(NAMES), rng.sample(facts.values, 2)
        found[name, old, new] = _contrast(facts, name, old, new, hard)
    return list(found.values())


def _contrast(facts: _Kind, name: str, old: str, new: str, hard: bool) -> Contrast:
    was, now = facts.was.format(name=name, value=old), facts.now.format(name=name, value=new)
    against = facts.now.format(name=name, value=old)
    told = " ".join([now, *[against] * _REPEATED]) if hard else f"{was} {now}"
    asked, *others = (f"{told} {words.format(name=name)}" for words in facts.asked)
    # As the program of PASTA's authors has it: the part of the new fact behind the name.
    marked = now.partition(name)[2].rstrip(".")
    return Contrast(asked, (marked,), f" {new}", f" {old}", tuple(others))


def read_contrasts(path: Path) -> list[Contrast]:
    """Samples of a file, one JSON object in every line.

    Raises:
        InputError: when it cannot be read, or a line is none.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r} cannot be read: {error}") from error
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(Contrast.of(json.loads(line)))
        except (ValueError, InputError) as error:
            raise InputError(f"line {number} of {str(path)!r}: {error}") from error
    if not found:
        raise InputError(f"{str(path)!r} holds no samples")
    return found


def first_answers(wanted: Sequence[int], unwanted: Sequence[int]) -> tuple[list[int], int, int]:
    """What two answers begin with in common, and the first token of each that the other has not there.

    Raises:
        InputError: when one is the beginning of the other.
    """
    for at, (one, other) in enumerate(zip(wanted, unwanted, strict=False)):
        if one != other:
            return list(wanted[:at]), one, other
    raise InputError("two answers do not differ in any token, or one is the beginning of the other")
