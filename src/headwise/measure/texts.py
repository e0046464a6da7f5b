"""Texts: files, or the manual that every Python has -> documents, passages of them, and sentences planted in those."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from headwise.errors import InputError
from headwise.files import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The document that is there without a file.
MANUAL = "Python's manual of topics"

# What WikiText makes of a hyphen between words, and of the signs inside a number; and of a rare word.
_MARK, _RARE = re.compile(r" @([-,.])@ "), "<unk>"

# Where a sentence or a line has ended.
_ENDS = re.compile(r"(?<=[.!?:;])\s+|\n+")


@dataclass(frozen=True)
class Document:
    """A text with a name."""

    name: str
    text: str


@dataclass(frozen=True)
class Passage:
    """Tokens in a row.

    Attributes:
        document: name of the text they are from.
        start: index of the first among the document's tokens.
    """

    document: str
    start: int
    ids: list[int]


def read_documents(files: Sequence[str | Path], undo_marks: bool = False) -> list[Document]:
    """One document per file; the manual where there is no file.

    Args:
        undo_marks: write WikiText's `@-@`, `@,@` and `@.@` as the signs they stand for, and `<unk>` as a word.

    Raises:
        InputError: when a file cannot be read.
    """
    documents = [Document(str(file), read_text(file)) for file in files] or [Document(MANUAL, manual())]
    if not undo_marks:
        return documents
    return [Document(d.name, _MARK.sub(r"\1", d.text).replace(_RARE, "unknown")) for d in documents]


def manual() -> str:
    """English prose and code that every Python has: its manual of topics."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def take_passages(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], length: int, count: int
) -> list[Passage]:
    """So many passages of every document: from its beginning, and then at equal steps, one for each.

    Args:
        length: tokens of a passage.
        count: passages of each document.

    Raises:
        InputError: when a document is too short for that many different ones.
    """
    passages = []
    for document in documents:
        # The whole text is longer than any model reads at once, and is not meant for that.
        ids = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        room = len(ids) - length
        if room < (count if count > 1 else 0):
            raise InputError(
                f"{document.name} has {len(ids):,} tokens, too few for {count} passages of {length:,}; "
                "give more text, or ask for fewer or shorter ones"
            )
        starts = [index * (room // count) for index in range(count)]
        passages += [Passage(document.name, start, ids[start : start + length]) for start in starts]
    return passages


def plant(text: str, sentences: Sequence[str], rng: random.Random) -> tuple[str, list[float]]:
    """The text with the sentences, in their order, at random places where a sentence or a line ends.

    Returns:
        the text, and the depth of every planted sentence, from 0 to 1.

    Raises:
        InputError: when the text has fewer such places.
    """
    places = [match.end() for match in _ENDS.finditer(text)]
    if len(places) < len(sentences):
        raise InputError(
            f"{len(sentences)} sentences do not fit between the {len(places) + 1} of a text of {len(text):,} "
            "characters; take longer passages or fewer facts"
        )
    chosen = sorted(rng.sample(places, len(sentences)))
    # From the end: what is in front of a place must not move before it is used.
    for place, sentence in reversed(list(zip(chosen, sentences, strict=True))):
        text = f"{text[:place]}{sentence} {text[place:]}"
    return text, [place / places[-1] for place in chosen]
