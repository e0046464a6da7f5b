"""Instructions: names, facts and rules -> what a user asks with an instruction in it, and an answer that obeys it.

Formats and pronouns are the tasks of PASTA (Zhang et al., ICLR 2024, section 4); rules that a program can check are
after IFEval (Zhou et al. 2023, arXiv 2311.07911). Texts are made of nothing but words in this package.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from headwise.errors import ConfigurationError
from headwise.measure.contrasts import NAMES, Contrast, values_of

INSTRUCTIONS = ("json", "pronouns", "rules")

_WOMEN = {
    *("Mary", "Anna", "Laura", "Sarah", "Julia", "Emma", "Clara", "Helen", "Alice", "Nina", "Rosa", "Lucy", "Diana"),
    *("Grace", "Irene", "Maria", "Sophie", "Judith"),
}
_THINGS = (
    *(("horse", "animal"), ("violin", "instrument"), ("tulip", "flower"), ("hammer", "tool"), ("castle", "building")),
    *(("sparrow", "bird"), ("bicycle", "vehicle"), ("lemon", "fruit"), ("poem", "text"), ("glacier", "mass of ice")),
    *(("candle", "source of light"), ("river", "body of water"), ("carpet", "piece of cloth"), ("beetle", "insect")),
    *(("bakery", "shop"), ("teacher", "person"), ("compass", "instrument"), ("pepper", "plant"), ("ship", "vessel")),
    *(("desert", "dry place"), ("mirror", "piece of glass"), ("whale", "animal"), ("letter", "message")),
    *(("trumpet", "instrument"), ("oak", "tree"), ("bridge", "building"), ("lantern", "lamp"), ("salmon", "fish")),
    *(("library", "place with books"), ("volcano", "mountain"), ("wolf", "animal"), ("kettle", "pot")),
    *(("harbour", "place for ships"), ("statue", "work of art"), ("tailor", "person"), ("cloud", "mass of drops")),
)
_QUESTIONS = ("Write a few sentences about a {thing}.", "What is a {thing}?", "Describe a {thing} to a child.")
_OPENINGS = ("Good morning", "To be honest", "Listen to me", "As you may know")
_ENDINGS = ("That is all", "I hope this helps", "Ask me for more", "Now you know")
_WORDS = ("silver", "window", "garden", "winter")


@dataclass(frozen=True)
class Instruction:
    """Something to do, and how.

    Attributes:
        asked: all that the user says.
        span: the instruction in it, which is marked.
        rule: by which an answer is judged.
        details: what the rule needs to know; plain values.
        obeying: an answer as it should be.
        ignoring: one that does not do what the instruction says.
    """

    asked: str
    span: str
    rule: str
    details: dict[str, str]
    obeying: str
    ignoring: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def contrast(self) -> Contrast:
        """By which heads are profiled: does the model begin as the one answer does, or as the other?"""
        return Contrast(self.asked, (self.span,), self.obeying, self.ignoring, chat=True)


def made_instructions(kind: str, count: int, seed: int, *, measured: bool = False) -> list[Instruction]:
    """So many of a kind, no two the same.

    Args:
        measured: of those that are to be measured. No name and no thing in these is in any of the others, by which
            heads are profiled.

    Raises:
        ConfigurationError: when there are not so many.
    """
    rng, found = random.Random(f"instructions {kind} {seed} {measured}"), dict[str, Instruction]()
    for _ in range(20 * count):
        made = _MAKERS[kind](rng, int(measured))
        found[made.asked] = made
        if len(found) == count:
            return list(found.values())
    raise ConfigurationError(f"{count:,} different samples of {kind!r} cannot be made")


def _json(rng: random.Random, half: int) -> Instruction:
    name, city = rng.choice(NAMES[half::2]), rng.choice(values_of("city"))
    old, new = rng.sample(values_of("occupation"), 2)
    text = (
        f"{name} was born in {city}. For many years {name} worked as a {old}, and now {name} works as a {new}. "
        f"{name} has {rng.choice(('two', 'three', 'four'))} children."
    )
    example = json.dumps({"name": "Tom", "occupation": "cook"})
    span = f"Give the name and the present occupation of {name} as JSON and say nothing else, like this: {example}"
    obeying = json.dumps({"name": name, "occupation": new})
    ignoring = f"{name} works as a {new}."
    return Instruction(f"{text}\n\n{span}", span, "json", {"name": name, "occupation": new}, obeying, ignoring)


def _pronouns(rng: random.Random, half: int) -> Instruction:
    name, text = rng.choice(NAMES[half::2]), "{name} was born in {city}. {They} worked there as a {job} for {n} years. "
    text += "In the evening {they} played the {instrument} with {their} friends, who liked {them}."
    facts = {"name": name, "n": rng.choice(("two", "ten", "five", "twenty"))}
    facts |= {each: rng.choice(values_of(kind)) for each, kind in (("city", "city"), ("job", "occupation"))}
    facts["instrument"] = rng.choice(values_of("instrument"))
    forms = ("She", "she", "her", "her") if name in _WOMEN else ("He", "he", "his", "him")
    theirs = ("They", "they", "their", "them")
    own, changed = (text.format(**facts, **dict(zip(theirs, each, strict=True))) for each in (forms, theirs))
    span = "Write this text again, with they, their and them in place of she, he, her, his and him."
    return Instruction(f"{own}\n\n{span}", span, "pronouns", {"changed": changed}, changed, own)


@dataclass(frozen=True)
class _Rule:
    """How an answer has to look.

    Attributes:
        told: the instruction; {detail} is one of the `details`.
        obey: a plain answer and the detail -> one that obeys.
    """

    told: str
    obey: Callable[[str, str], str]
    details: tuple[str, ...] = ("",)


_RULES = {
    "capitals": _Rule("Use capital letters only.", lambda plain, _: plain.upper()),
    "lowercase": _Rule("Use lowercase letters only.", lambda plain, _: plain.lower()),
    "no commas": _Rule("Do not use any commas.", lambda plain, _: plain.replace(",", "")),
    "list": _Rule(
        'Give your answer as a list of two points, each on a line that begins with "* ".',
        lambda plain, _: "\n".join(f"* {part}." for part in plain.rstrip(".").split(". ")),
    ),
    "quotes": _Rule("Put your whole answer in double quotes.", lambda plain, _: f'"{plain}"'),
    "title": _Rule(
        "Put a title in double angle brackets before your answer, like <<this>>.",
        lambda plain, _: f"<<{plain.split(' is ')[0]}>>\n{plain}",
    ),
    "opening": _Rule(
        'Begin your answer with the words "{detail}".', lambda plain, detail: f"{detail}: {plain}", _OPENINGS
    ),
    "ending": _Rule('End your answer with the words "{detail}".', lambda plain, detail: f"{plain} {detail}.", _ENDINGS),
    "word": _Rule('Use the word "{detail}" in your answer.', lambda plain, detail: f"{plain} Its {detail}...", _WORDS),
}
RULES = tuple(_RULES)


def _rules(rng: random.Random, half: int) -> Instruction:
    thing, sort = rng.choice(_THINGS[half::2])
    name = rng.choice(RULES)
    rule = _RULES[name]
    detail = rng.choice(rule.details)
    span = rule.told.format(detail=detail)
    article = "An" if thing[0] in "aeiou" else "A"
    plain = f"{article} {thing}, as you can see, is a kind of {sort}. Many people like it a lot."
    asked = rng.choice(_QUESTIONS).format(thing=thing).replace(f"a {thing}", f"{article.lower()} {thing}")
    # Where an answer that obeys goes on behind the plain one, that has to go on too.
    obeying, ignoring = rule.obey(plain, detail), f"{plain} They are old."
    return Instruction(f"{asked} {span}", span, name, {"detail": detail, "thing": thing}, obeying, ignoring)


_MAKERS: dict[str, Callable[[random.Random, int], Instruction]] = {
    "json": _json,
    "pronouns": _pronouns,
    "rules": _rules,
}
