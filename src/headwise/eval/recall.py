"""Recall: real text with a few facts in it -> whether one that is asked for is still there."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from transformers import PreTrainedTokenizerBase

from headwise.errors import ConfigurationError
from headwise.eval.question import Question, QuestionTask
from headwise.measure.texts import plant, read_documents, take_passages

# What facts are about: common words that no manual puts next to "secret number".
PLACES = (
    *("harbour", "lighthouse", "bakery", "cathedral", "quarry", "orchard", "windmill", "museum", "theatre", "stadium"),
    *("library", "castle", "railway", "vineyard", "brewery", "chapel", "fortress", "greenhouse", "hospital", "market"),
    *("monastery", "observatory", "palace", "refinery", "sawmill", "school", "tavern", "temple", "tunnel", "village"),
)


@dataclass(frozen=True)
class Recall(QuestionTask):
    """Facts at random depths in real text, one of which is asked for; the others are there to be mistaken for it.

    Args:
        files: UTF-8 texts; Python's manual where there are none.
        facts: in every text.
        undo_marks: write WikiText's `@-@`, `@,@` and `@.@` as the signs they stand for, and `<unk>` as a word.
    """

    files: tuple[Path, ...] = ()
    facts: int = 4
    undo_marks: bool = False

    name: ClassVar[str] = "recall"
    through_server: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.facts <= len(PLACES):
            raise ConfigurationError(f"facts must be a count from 1 to {len(PLACES)}, got {self.facts}")

    @property
    def title(self) -> str:
        """With the number of facts."""
        return f"{self.name} of 1 fact in {self.facts}"

    def questions(self, tokenizer: PreTrainedTokenizerBase) -> Iterator[Question]:
        """Passages from all over the texts, each with facts of its own."""
        documents = read_documents(self.files, self.undo_marks)
        per_document = -(-self.count // len(documents))
        passages = take_passages(tokenizer, documents, self.context, per_document)
        for number, passage in enumerate(passages[: self.count]):
            rng = random.Random(f"recall {self.seed} {number}")
            places = rng.sample(PLACES, self.facts)
            numbers = [str(secret) for secret in rng.sample(range(10_000, 100_000), self.facts)]
            asked = rng.randrange(self.facts)
            sentences = [f"The secret number of the {p} is {n}." for p, n in zip(places, numbers, strict=True)]
            document, depths = plant(tokenizer.decode(passage.ids), sentences, rng)
            yield Question(
                document,
                f"What is the secret number of the {places[asked]}? Answer with the number.",
                f"The secret number of the {places[asked]} is",
                [numbers[asked]],
                {"document": passage.document, "start": passage.start, "depth": depths[asked]},
            )
